"""A base and an adapter on disk: found, and looked into as far as needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcat.base.checkpoint import base_folder, count_layers, first_line
from qcat.errors import ExportError, ModelError
from qcat.gguf.architecture import EMBEDDING, HEAD
from qcat.gguf.q4_0 import PEFT_TYPE
from qcat_convert.weights import Checkpoint

_SAVED_MODULES = frozenset({"lm_head", "embed_tokens"})


@dataclass(frozen=True)
class Source:
    """A base and an adapter, found and looked into as far as needs no torch."""

    base: str
    """As the user or the adapter named it."""
    folder: Path
    """Of the base."""
    adapter: Path | None
    tokenizer_folder: Path
    """The adapter's folder if it has a tokenizer of its own, else the base's."""
    vocabulary_rows: int
    """Rows of the merged embedding."""
    layers: int
    """Of the merged model: fewer than the base has if the adapter was trained on fewer."""
    base_layers: int
    scales: bool
    """Whether the adapter is one of scales: its matrices are in Q4_0 already."""


def locate(adapter: Path | None, base: str | None) -> Source:
    """Find a base and an adapter.

    Args:
        adapter: folder that PEFT's `save_pretrained` wrote; None exports the base as it is.
        base: local folder or hub name; None takes the one that the adapter names.

    Raises:
        ExportError, ModelError: what is absent, unsupported or damaged, by name.
    """
    config = _adapter_config(adapter) if adapter else {}
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ExportError(f"{adapter}: names no base model: give one with --base")
    folder = base_folder(base)
    shapes = Checkpoint(folder).shapes
    stored = shapes.get(EMBEDDING) or shapes.get(HEAD)
    if not stored:
        raise absent(folder, [EMBEDDING])
    rows = stored[0]
    tokenizer_folder = folder
    if adapter:
        # An adapter that was trained with tokens added brings their rows itself.
        rows = _embedding_rows(adapter) or rows
        if (adapter / "tokenizer.json").is_file():
            tokenizer_folder = adapter
    whole = count_layers(folder)
    layers = _kept_layers(config) or whole
    scales = config.get("peft_type") == PEFT_TYPE
    return Source(base, folder, adapter, tokenizer_folder, rows, layers, whole, scales)


def is_scales(adapter: Path) -> bool:
    """Whether an adapter is one of scales. Raises ExportError: it cannot be used at all."""
    return bool(_adapter_config(adapter).get("peft_type") == PEFT_TYPE)


def absent(folder: Path, names: Sequence[str]) -> ModelError:
    return ModelError(
        f"base {folder}: has no weights that fit {names[0]} ({len(names)} such tensors): "
        "download it again, or save it with save_pretrained"
    )


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
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", PEFT_TYPE):
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


def _kept_layers(config: Mapping[str, Any]) -> int | None:
    """How many layers of its base an adapter is for, from the bottom; None for all.

    PEFT's `layer_replication` names the layers of the base that make up the model: `[[0, 14]]` is
    the first 14, as `qcat train --layers 14` writes it.
    """
    stack = config.get("layer_replication")
    return int(stack[0][1]) if stack else None


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
