"""Checks a PEFT adapter's two files before PEFT reads them, because it ignores unknown content.

Names and fields are those of `PeftModel.save_pretrained` and `LoraConfig`
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcat.base.checkpoint import first_line
from qcat.errors import ExportError
from qcat.files import check_pulled, read_json
from qcat.gguf.q4_0 import PEFT_TYPE

if TYPE_CHECKING:
    import torch


def _is_names(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _is_modules(value: object) -> bool:
    if not isinstance(value, str):
        return _is_names(value)
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_numbers(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "target_modules": (_is_modules, "names of modules, or a regular expression,"),
    "exclude_modules": (_is_modules, "names of modules, or a regular expression,"),
    "modules_to_save": (_is_names, "names of modules"),
    "lora_dropout": (_is_number, "a number"),
    "rank_pattern": (_is_numbers, "numbers by module"),
    "alpha_pattern": (_is_numbers, "numbers by module"),
}
_UNMERGEABLE = ("alora_invocation_tokens", "lora_bias")
_SAVED_MODULES = frozenset({"lm_head", "embed_tokens"})
_CLASSIFIER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Initializations that subtract the adapter's initial values from the base's weights
_CHANGES_BASE = re.compile(r"(pissa|olora|corda|loftq|lora_ga).*", re.IGNORECASE)
# Name parts that compiling, sharding and multimodal models add when they wrap modules
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "language_model"}
)
_PREFIXES = ("base_model.model.", "module.", "")
_INNER = re.compile(r"(model\.(layers|embed_tokens|norm)|lm_head)\..+")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json` for an adapter of LoRA or of scales.

    Raises:
        ExportError: it is missing or damaged, or the adapter cannot be merged.
    """
    path = folder / CONFIG
    advice = "name the folder that PEFT's save_pretrained wrote"
    config = read_json(path, error=ExportError, advice=advice)
    kind = config.get("peft_type")
    if kind == PEFT_TYPE:
        _check_layers(path, config)
        return config
    if kind is None and (folder / "adapters.safetensors").is_file():
        raise ExportError(
            f"{folder}: holds an adapter of MLX: fuse it with mlx_lm.fuse and export the model"
        )
    if kind != "LORA":
        raise ExportError(
            f"{path}: peft_type is {kind!r}: only LoRA (rsLoRA, DoRA too) can be merged"
        )
    if config.get("task_type") in _CLASSIFIER_TASKS:
        raise ExportError(
            f"{path}: task_type is {config['task_type']}: its answer is a number of a "
            "classification head, and a GGUF answers in words: train with task_type CAUSAL_LM"
        )
    for key, (fits, what) in _FIELDS.items():
        if not fits(config.get(key)):
            raise ExportError(f"{path}: {key} is {config[key]!r}: {what} expected")
    for key in _UNMERGEABLE:
        if config.get(key):
            raise ExportError(f"{path}: sets {key}, which cannot be merged: train without it")
    for module in config.get("modules_to_save") or ():
        if module.rsplit(".", 1)[-1] not in _SAVED_MODULES:
            raise ExportError(
                f"{path}: modules_to_save holds {module!r}: only lm_head and embed_tokens "
                "can be exported"
            )
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise ExportError(f"{path}: {key} is {value!r}: a number above 0 expected")
    initialized = config.get("init_lora_weights")
    if isinstance(initialized, str) and _CHANGES_BASE.fullmatch(initialized):
        raise ExportError(
            f"{path}: init_lora_weights is {initialized!r}, which has changed the base's own "
            "weights: save the adapter with save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…), as PEFT describes it, to make it plain "
            "LoRA"
        )
    _check_layers(path, config)
    return config


def known_fields(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that the installed PEFT knows. Imports PEFT.

    Raises:
        ExportError: a field is set that PEFT does not know and would drop.
    """
    from dataclasses import fields

    import peft

    known = {field.name for field in fields(peft.LoraConfig)}
    for key, value in config.items():
        if key not in known and value:
            raise ExportError(
                f"{folder / CONFIG}: sets {key!r}, which PEFT {peft.__version__} does not know: "
                "upgrade peft"
            )
    return {key: value for key, value in config.items() if key in known}


def _check_layers(path: Path, config: Mapping[str, Any]) -> None:
    match config.get("layer_replication"):
        case None | []:
            return
        case [[0, int(count)]] if count > 0:
            return
        case stack:
            raise ExportError(
                f"{path}: layer_replication is {stack}: only a base's first layers, as [[0, 14]], "
                "can be exported"
            )


def kept_layers(config: Mapping[str, Any]) -> int | None:
    """How many layers of its base an adapter is for, from the bottom; None for all.

    PEFT's `layer_replication` names the layers of the base that make up the model: `[[0, 14]]` is
    the first 14, as `qcat train --layers 14` writes it.
    """
    stack = config.get("layer_replication")
    return int(stack[0][1]) if stack else None


def embedding_rows(folder: Path) -> int | None:
    """Rows of an embedding or head that an adapter saved in full, if it saved one.

    Raises:
        ExportError: its weights are absent or damaged.
    """
    with opened_weights(folder, "np") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                return int(file.get_slice(name).get_shape()[0])
    return None


def read_lora_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA adapter in float32, by PEFT's current names.

    Args:
        folder: folder of the adapter.
        config: result of `read_adapter_config`.

    Raises:
        ExportError: they are missing, damaged, not finite, or contradict the configuration.
    """
    path = folder / WEIGHTS
    tensors: dict[str, torch.Tensor] = {}
    with opened_weights(folder, "pt") as file:
        for stored in file.keys():  # noqa: SIM118 (no mapping)
            name = plain_name(stored)
            if name in tensors:
                raise ExportError(f"{path}: holds two tensors for {name}: save the adapter anew")
            tensors[name] = file.get_tensor(stored).float()
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ExportError(
                f"{path}: {name} holds numbers that are not finite: the training diverged: lower "
                "its learning rate"
            )
        rank = _rank(name, tensor)
        if rank is not None and rank != config["r"] and not config.get("rank_pattern"):
            raise ExportError(
                f"{path}: {name} has rank {rank}, and {CONFIG} says r = {config['r']}: "
                "they are not of one adapter: save it anew"
            )
    return tensors


def plain_name(name: str) -> str:
    """A tensor's name as PEFT saves it, without parts added by wrappers and adapter names.

    Examples:
        >>> plain_name("base_model.model._orig_mod.model.norm.lora_A.default.weight")
        'base_model.model.model.norm.lora_A.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    short = [
        part
        for number, part in enumerate(parts)
        if not (part == "default" and number and parts[number - 1].startswith("lora_"))
    ]
    text = ".".join(short)
    for prefix in _PREFIXES:
        if text.startswith(prefix) and _INNER.fullmatch(text.removeprefix(prefix)):
            return "base_model.model." + text.removeprefix(prefix)
    return name


def _rank(name: str, tensor: torch.Tensor) -> int | None:
    if tensor.ndim < 2:
        return None
    if name.endswith("lora_A.weight"):
        return int(tensor.shape[0])
    if name.endswith("lora_B.weight"):
        return int(tensor.shape[1])
    return None


@contextmanager
def opened_weights(folder: Path, framework: str) -> Iterator[Any]:
    """An adapter's `adapter_model.safetensors`, as `safetensors.safe_open` opens it.

    Raises:
        ExportError: it is absent, or not what PEFT writes.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    check_pulled(path, error=ExportError)
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        if pickled.is_file():
            raise ExportError(
                f"{pickled}: a pickle can run any code, so it is not read: load the adapter with "
                "PEFT and save it with save_pretrained, which writes safetensors"
            )
        raise ExportError(f"{path}: no such file: save the adapter with PEFT's save_pretrained")
    try:
        with safe_open(path, framework) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: damaged: {first_line(error)}") from None
