"""Locates a base model's checkpoint, locally or on the hub, and loads it.

For training and conversion, so the heavy libraries are imported when a function needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcat.base.gguf_base import gguf_checkpoint, is_gguf
from qcat.errors import ModelError
from qcat.files import read_json
from qcat.gguf.architecture import named_architecture

if TYPE_CHECKING:
    import torch

_TOKENIZER_FILES = ["tokenizer*.json", "config.json"]
_FILES = ["*.safetensors", "*.json", "*.txt", "tokenizer.model"]
_NUMBERS = (
    "num_hidden_layers", "vocab_size", "max_position_embeddings", "hidden_size",
    "intermediate_size", "num_attention_heads",
)  # fmt: skip
_PER_LAYER = ("layer_types", "mlp_layer_types")
"""Lists in a configuration with an entry for each layer, as transformers' validator has them."""


def base_folder(base: str, *, weights: bool = True) -> Path:
    """The folder of a base model: the given folder, or one from the hub's cache or the hub.

    A GGUF is dequantized into the cache folder first (`qcat.base.gguf_base`).

    Args:
        base: local folder, hub name, GGUF file, or `ollama:NAME` for a model in Ollama's store.
        weights: False if the tokenizer is all that is needed.

    Raises:
        ModelError: it is none of these, or has no safetensors file where weights are wanted.
    """
    if is_gguf(base):
        return gguf_checkpoint(base)
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            HfHubHTTPError,
            HFValidationError,
            HTTPError,
        )

        try:
            patterns = _FILES if weights else _TOKENIZER_FILES
            folder = Path(snapshot_download(base, allow_patterns=patterns))
        except (OSError, HFValidationError, HfHubHTTPError, HTTPError, ValueError) as error:
            raise ModelError(
                f"base {base!r}: no such folder, and not to be had from the hub "
                f"({first_line(error)}): check the name and the network, or give a local folder "
                "with --base"
            ) from None
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelError(f"base {folder}: no .safetensors file: save it with save_pretrained")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` of a checkpoint's folder says, as far as is needed here checked.

    Read without transformers, whose import brings torch: seconds, and hundreds of megabytes.

    Raises:
        ModelError: it is absent or damaged, or lacks a size of the model.
        ExportError: an architecture that cannot be converted.
    """
    path = folder / "config.json"
    config = read_json(path, error=ModelError, advice="save the model with save_pretrained")
    arch = named_architecture(config.get("architectures"))
    if config.get("model_type") != arch.model_type:
        raise ModelError(
            f"{path}: model_type is {config.get('model_type')!r}, and {arch.model_type!r} belongs "
            "to its architecture: download it again"
        )
    for key in _NUMBERS:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"{path}: {key} is {value!r}: a whole number above 0 expected")
    return config


def count_layers(folder: Path) -> int:
    """How many layers the model in a checkpoint's folder has. Raises as `read_config` does."""
    return int(read_config(folder)["num_hidden_layers"])


def load_config(folder: Path, layers: int | None = None) -> Any:
    """The transformers configuration of a checkpoint's folder.

    Args:
        folder: as `base_folder` gives it.
        layers: how many to keep of the model's, from the bottom; None keeps all.

    Raises:
        ModelError: there is none that can be read, or it has fewer layers, or the model is
            quantized (merging into a quantized base loses the fine-tune).
        ExportError: an architecture that cannot be converted.
    """
    read_config(folder)
    config = parse_config(folder)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ModelError(
                f"base {folder}: has {config.num_hidden_layers} layers: keep between 1 and all of "
                f"them, not {layers}"
            )
        for name in _PER_LAYER:
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name)[:layers])
        config.num_hidden_layers = layers
    return config


def parse_config(folder: Path) -> Any:
    """The transformers configuration of a checkpoint of any architecture.

    Raises:
        ModelError: there is none that can be read, or the model is quantized.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        # Code in the folder is never run, and the user is not asked whether to run it.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:  # a value that it does not take
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder / 'config.json'}: {reason}: download it again, or upgrade transformers"
        ) from None
    if getattr(config, "quantization_config", None):
        raise ModelError(f"base {folder}: is quantized: start from the unquantized base")
    return config


def load_base(folder: Path, dtype: torch.dtype, layers: int | None = None) -> Any:
    """The causal language model of a folder, on the CPU.

    Args:
        folder: as `base_folder` gives it.
        dtype: of the weights.
        layers: how many to keep, from the bottom; None keeps all. Embedding, final norm and head
            stay. What is above them is not read.

    Raises:
        ModelError, ExportError: as `load_config` and `load_model`.
    """
    return load_model(folder, load_config(folder, layers), dtype)


def load_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """A causal language model of any architecture, on the CPU, with the weights in a folder.

    Args:
        folder: as `base_folder` gives it.
        config: its configuration; what it has no place for is not read.
        dtype: of the weights.

    Raises:
        ModelError: the weights cannot be loaded, or are not whole.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call] # the command line draws its own

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"base {folder}: cannot be loaded: {first_line(error)}") from None
    # transformers fills missing tensors with new random numbers at each load
    model, info = loaded
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        raise ModelError(
            f"base {folder}: has no weights that fit {absent[0]} ({len(absent)} such tensors): "
            "download it again, or save it with save_pretrained"
        )
    for name, parameter in model.named_parameters():
        if not all(bool(extreme.isfinite()) for extreme in parameter.detach().aminmax()):
            raise ModelError(
                f"base {folder}: {name} holds numbers that are not finite: download it again"
            )
    return model


def first_line(error: Exception) -> str:
    """The first line of a library's error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
