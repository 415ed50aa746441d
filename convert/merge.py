"""Base model and PEFT LoRA adapter to one merged model, in float32.

Merging into a quantized base loses the fine-tune, so such a base is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.tensors import architecture
from qcat.checkpoint import base_folder, first_line, load_base, load_config
from qcat.errors import ExportError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAVED_MODULES = frozenset({"lm_head", "embed_tokens"})


@dataclass(frozen=True)
class Merged:
    """A merged model and where it came from."""

    model: PreTrainedModel
    """Float32, on the CPU, in evaluation mode."""
    tokenizer_folder: Path
    """The adapter's folder if it has a tokenizer of its own, else the base's."""
    base: str
    """As the user or the adapter named it."""
    base_layers: int
    """How many the base has; the model has fewer if the adapter was trained on fewer."""
    fingerprint: str
    """As `fingerprint` gives it."""

    @property
    def layers(self) -> int:
        """How many the model has."""
        return int(self.model.config.num_hidden_layers)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding."""
        weight: Any = self.model.get_input_embeddings().weight
        return int(weight.shape[0])


def merge(adapter: Path | None, base: str | None) -> Merged:
    """Load a base, as much of it as the adapter is for, and fold the adapter into the weights.

    Args:
        adapter: folder that PEFT's `save_pretrained` wrote; None exports the base as it is.
        base: local folder or hub name; None takes the one that the adapter names.

    Raises:
        ExportError, ModelError: what is absent, unsupported or does not fit, by name.
    """
    import torch

    config = _adapter_config(adapter) if adapter else {}
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ExportError(f"{adapter}: names no base model: give one with --base")
    folder = base_folder(base)
    whole = load_config(folder)
    architecture(whole)  # what cannot be converted need not be loaded
    model = load_base(folder, torch.float32, _kept_layers(config))
    tokenizer_folder = folder
    if adapter:
        if (adapter / "tokenizer.json").is_file():
            tokenizer_folder = adapter
        model = _apply(model, adapter)
    _check_finite(model)
    return Merged(
        model.eval(), tokenizer_folder, base, whole.num_hidden_layers, fingerprint(folder, adapter)
    )


def _kept_layers(config: Mapping[str, Any]) -> int | None:
    """How many layers of its base an adapter is for, from the bottom; None for all.

    PEFT's `layer_replication` names the layers of the base that make up the model: `[[0, 14]]` is
    the first 14, as `qcat train --layers 14` writes it.
    """
    stack = config.get("layer_replication")
    return int(stack[0][1]) if stack else None


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ExportError(
            f"{path}: {error.strerror}: name the folder that PEFT's save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise ExportError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ExportError(f"{path}: not a LoRA adapter: only LoRA (rsLoRA, DoRA too) can be merged")
    for module in config.get("modules_to_save") or ():
        if module.rsplit(".", 1)[-1] not in _SAVED_MODULES:
            raise ExportError(
                f"{path}: modules_to_save holds {module!r}: only lm_head and embed_tokens "
                "can be exported"
            )
    match config.get("layer_replication"):
        case None | [] | [[0, int()]]:
            return config
        case stack:
            raise ExportError(
                f"{path}: layer_replication is {stack}: only a base's first layers, as [[0, 14]], "
                "can be exported"
            )


def _apply(model: Any, adapter: Path) -> Any:
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    rows = _embedding_rows(adapter)
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        # The adapter was trained with tokens added; it brings their rows itself.
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.layer_replication = None  # the layers are picked already, and PEFT merges no others
        tuned = PeftModel.from_pretrained(model, str(adapter), config=config).eval()
        before = _probe(tuned)
        merged = tuned.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"adapter {adapter}: does not fit the base: {first_line(error)}"
        ) from None
    if float((_probe(merged) - before).abs().max()) > 1e-2 * float(before.abs().max()):
        raise ExportError(
            f"adapter {adapter}: merging changes what the model computes, as LoRA on a tied head "
            "or embedding does: train without lm_head and embed_tokens in target_modules"
        )
    return merged


def _probe(model: Any) -> torch.Tensor:
    """Logits after a few arbitrary tokens, shape (n_vocab,): to compare before and after."""
    import torch

    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=torch.arange(3, 19)[None]).logits[0, -1]).clone()


def _embedding_rows(adapter: Path) -> int | None:
    """Rows of an embedding or head that the adapter saved whole, if it saved one."""
    from safetensors import SafetensorError, safe_open

    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise ExportError(f"{path}: no such file: save the adapter with PEFT's save_pretrained")
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                    return int(file.get_slice(name).get_shape()[0])
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: damaged: {first_line(error)}") from None
    return None


def _check_finite(model: torch.nn.Module) -> None:
    for name, tensor in model.named_parameters():
        # aminmax hands on a NaN and, unlike isfinite, makes no copy
        if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
            raise ExportError(f"merged tensor {name} holds infinite or undefined numbers")


def fingerprint(base: Path, adapter: Path | None) -> str:
    """SHA-256 over a base's weight files and an adapter's, in hexadecimal."""
    files = sorted(base.glob("*.safetensors"))
    if adapter:
        files += sorted(adapter.glob("adapter_model.*"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
