"""Locates a base and an adapter on disk, and inspects them as far as possible without torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcat.base.checkpoint import base_folder, count_layers
from qcat.errors import ExportError, ModelError
from qcat.gguf.architecture import EMBEDDING, HEAD
from qcat.gguf.q4_0 import PEFT_TYPE
from qcat_convert.peft_adapter import embedding_rows, kept_layers, read_adapter_config
from qcat_convert.weights import Checkpoint


@dataclass(frozen=True)
class Source:
    """A base and an adapter on disk, inspected as far as possible without torch."""

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
        base: local folder or hub name; None uses the one named in the adapter.

    Raises:
        ExportError, ModelError: something is missing, unsupported or damaged; names it.
    """
    config, base = named_base(adapter, base)
    folder = base_folder(base)
    shapes = Checkpoint(folder).shapes
    stored = shapes.get(EMBEDDING) or shapes.get(HEAD)
    if not stored:
        raise ModelError(f"base {folder}: has no {EMBEDDING}: save it with save_pretrained")
    rows = stored[0]
    if adapter:
        # An adapter that was trained with added tokens contains their rows.
        rows = embedding_rows(adapter) or rows
    tokenizer_folder = folder_of_tokenizer(folder, adapter)
    whole = count_layers(folder)
    layers = kept_layers(config) or whole
    scales = config.get("peft_type") == PEFT_TYPE
    return Source(base, folder, adapter, tokenizer_folder, rows, layers, whole, scales)


def named_base(adapter: Path | None, base: str | None) -> tuple[dict[str, Any], str]:
    """An adapter's configuration (empty without one), and the name of its base.

    Args:
        adapter: folder of the adapter.
        base: the name if it was given; None uses the one in the adapter.

    Raises:
        ExportError: no base is named, or the adapter cannot be used.
    """
    config = read_adapter_config(adapter) if adapter else {}
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ExportError(f"{adapter}: names no base model: give one with --base")
    return config, base


def folder_of_tokenizer(base: Path, adapter: Path | None) -> Path:
    """The adapter's folder if it has a tokenizer of its own, else the base's."""
    if adapter and (adapter / "tokenizer.json").is_file():
        return adapter
    return base


def is_scales(adapter: Path) -> bool:
    """Whether an adapter is one of scales. Raises ExportError: it cannot be used at all."""
    return bool(read_adapter_config(adapter).get("peft_type") == PEFT_TYPE)


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
