"""Converts a PEFT LoRA adapter to a GGUF adapter, for use with the base it was trained on.

llama.cpp adds `alpha / rank · B A x` to what the base computes (its `convert_lora_to_gguf.py` has
the names). Only plain LoRA on linear layers can be written in this form.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qcat.base.checkpoint import load_config
from qcat.base.gguf_base import gguf_file, is_gguf
from qcat.base.ollama_store import PREFIX
from qcat.errors import ExportError
from qcat.gguf.adapter import BASE_KEY, BaseFile
from qcat.gguf.architecture import architecture, gguf_name, gguf_tensor, hyper_parameters
from qcat.gguf.bundle import fingerprint
from qcat.gguf.check import check_model
from qcat.gguf.header import read_header
from qcat.gguf.sections import SOURCE_KEY, TASK_KEY, copy_without
from qcat.task import Task
from qcat_convert.peft_adapter import known_fields, read_adapter_config, read_lora_tensors
from qcat_convert.quantize import Quantized
from qcat_convert.source import Source

_CAPABLE = re.compile(r"tools|tool_call|<think>|</think>")
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."
_TEMPLATE = "tokenizer.chat_template"
_MERGED_ONLY = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)
BASE_COPY = "base-for-ollama.gguf"


class ServedBase(NamedTuple):
    """The base for which an adapter is written."""

    path: Path
    """Of its GGUF."""
    file: BaseFile
    in_ollama: str
    """What a Modelfile's FROM names."""


def served_base(source: Source, folder: Path) -> ServedBase:
    """The base of a run as it is served: the same file that was trained on.

    If the base's own chat template mentions tools or thinking, Ollama uses it instead of the
    Modelfile's. Then a copy without the template is put into the bundle's folder for Ollama.

    Raises:
        ExportError: it is not a GGUF.
        ModelError, BundleError: it no longer exists, or is damaged.
    """
    if not is_gguf(source.base):
        raise ExportError(
            f"base {source.base}: is no GGUF: an adapter lies beside a file that is served as it "
            "is: train on one with --base FILE.gguf, or export merged"
        )
    path = gguf_file(source.base).resolve()
    header = read_header(path)
    check_model(path, header)
    named = source.base if source.base.startswith(PREFIX) else str(path)
    in_ollama = named.removeprefix(PREFIX)
    if _CAPABLE.search(str(header.metadata.get(_TEMPLATE, ""))):
        copy_without(path, folder / BASE_COPY, _TEMPLATE)
        in_ollama = f"./{BASE_COPY}"
    base = BaseFile(named, fingerprint(path, header, anywhere=True))
    return ServedBase(path, base, in_ollama)


def write_adapter(
    target: Path, source: Source, *, base: BaseFile, task: Task, made_from: Mapping[str, Any]
) -> Quantized:
    """Write the adapter's matrices in float16, with the task and what they were made from.

    Args:
        target: the file.
        source: the adapter and its base, as checkpoint folders.
        base: the base file of the adapter.
        task: stored completely in the metadata, as in a model file.
        made_from: versions and fingerprint.

    Raises:
        ExportError: the adapter cannot be used beside its base.
    """
    from gguf import GGUFWriter

    if source.adapter is None or source.scales:
        raise ExportError("only a LoRA adapter can lie beside its base: train with --method lora")
    folder = source.adapter
    config = read_adapter_config(folder)
    known_fields(folder, config)  # which raises for settings that it does not know
    _check(config, source, folder)
    base_config = load_config(source.folder, source.layers)
    arch = architecture(base_config)
    params = hyper_parameters(base_config, source.vocabulary_rows)
    rank = int(config["r"])
    scaling = float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    writer = GGUFWriter(target, arch.name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", scaling * rank)
        writer.add_name(task.name)
        writer.add_string(TASK_KEY, json.dumps(task.to_dict(), ensure_ascii=False))
        writer.add_string(SOURCE_KEY, json.dumps(dict(made_from), ensure_ascii=False))
        writer.add_string(BASE_KEY, json.dumps(base.to_dict(), ensure_ascii=False))
        for name, tensor in read_lora_tensors(folder, config).items():
            if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
                raise ExportError(
                    f"adapter {folder}: tensor {name} cannot lie beside the base: export it merged"
                )
            layer, end = name.removesuffix(_A).removesuffix(_B), name.endswith(_A)
            weight = f"{layer.removeprefix(_PREFIX)}.weight"
            # Rows of B are the layer's outputs, which some architectures order differently.
            values = tensor if end else gguf_tensor(weight, tensor, arch, params)
            stored = values.half().contiguous()
            if not bool(stored.isfinite().all()):
                raise ExportError(f"adapter {folder}: tensor {name} does not fit float16")
            writer.add_tensor(
                f"{gguf_name(weight, arch)}.lora_{'a' if end else 'b'}", stored.numpy()
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    types = Counter(tensor.type for tensor in read_header(target).tensors)
    return Quantized(dict(types.most_common()), {})


def _check(config: Mapping[str, Any], source: Source, folder: Path) -> None:
    odd = [name for name in _MERGED_ONLY if config.get(name)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if source.layers != source.base_layers:
        odd.append("layer_replication")
    if odd:
        raise ExportError(
            f"adapter {folder}: uses {', '.join(odd)}, which cannot lie beside the base: export it "
            "merged"
        )
