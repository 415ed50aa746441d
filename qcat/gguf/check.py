"""Checks that a GGUF is a model that llama.cpp can use, because it aborts on some others.

A model that qcat made is checked down to every number; of any other, what is common to all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcat.errors import BundleError
from qcat.gguf.header import SCORES, TOKENS, TYPES, DamagedError, Header, Length, shown
from qcat.gguf.sections import SOURCE_KEY

# What `qcat_convert.writer` writes of a model, with the largest number that makes sense
_TOKENIZERS = {"qwen3": "gpt2", "qwen2": "gpt2", "llama": "gpt2", "gemma3": "llama"}
"""GGUF's name for the tokenizer of each architecture."""
_COUNTS = {
    "block_count": 512,  # llama.cpp's own limit
    "context_length": 1 << 30,
    "embedding_length": 1 << 20,
    "feed_forward_length": 1 << 22,
    "attention.head_count": 1 << 12,
    "attention.head_count_kv": 1 << 12,
    "attention.key_length": 1 << 12,
    "attention.value_length": 1 << 12,
    "attention.sliding_window": 1 << 30,
    "rope.dimension_count": 1 << 12,
    "vocab_size": 1 << 24,
}
OTHER_TOKENIZERS = ("gpt2", "llama")
"""What a model that llama.cpp's own converter converted may have: byte-level BPE, SentencePiece."""
_RATES = ("rope.freq_base", "attention.layer_norm_rms_epsilon")


def check_model(path: Path, header: Header) -> None:
    """Reject files that `qcat export` does not write, because llama.cpp aborts on some.

    Raises:
        BundleError: naming the file; it may be any GGUF, with a qcat task or without.
    """
    if reason := unfit(header):
        raise BundleError(f"{path}: {reason}: export it again")


def unfit(header: Header) -> str | None:
    """Why a file is not a model that qcat makes and llama.cpp accepts; None if it is."""
    try:
        _check_model(header)
    except DamagedError as error:
        return str(error)
    return None


def check_foreign(path: Path, header: Header) -> None:
    """Reject files that are no generative model, whoever made them.

    Whether llama.cpp knows the architecture, it says itself.

    Raises:
        BundleError: naming the file.
    """
    try:
        _check_foreign(header)
    except DamagedError as error:
        raise BundleError(f"{path}: {error}: choose a generative model in one GGUF file") from None


def _check_foreign(header: Header) -> None:
    metadata = header.metadata
    arch, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if arch == "clip" or kind == "mmproj":
        raise DamagedError("is a multimodal projector, and no language model")
    if kind != "model":
        raise DamagedError(f"is of type {shown(kind)}, and no model")
    if not isinstance(arch, str):
        raise DamagedError("names no architecture")
    if metadata.get(f"{arch}.pooling_type") or metadata.get(f"{arch}.attention.causal") is False:
        raise DamagedError("is an embedding model, which writes nothing")
    parts = metadata.get("split.count", 0)  # 0 in a file that was put together again
    if type(parts) is not int or parts > 1:
        raise DamagedError("is one of several parts")
    for name, most in _COUNTS.items():
        value = metadata.get(f"{arch}.{name}", 1)
        # An array has a number for each layer; 0 stands where a layer has none.
        if not isinstance(value, Length) and not (type(value) is int and 0 <= value <= most):
            raise DamagedError(f"metadata {arch}.{name} is {shown(value)}")
    _check_other_tokenizer(metadata)
    if metadata["tokenizer.ggml.model"] == "llama" and metadata.get(
        "tokenizer.ggml.add_space_prefix", True
    ):
        raise DamagedError(
            "has a tokenizer that puts a space before every text (as Llama 2, the first Mistral "
            "and Phi-3 have), which qcat cannot use"
        )
    _check_vocabulary(header)


def _check_model(header: Header) -> None:
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if not _made_by_converter(header):
        if arch not in _TOKENIZERS:
            raise DamagedError(f"architecture {shown(arch)} is not one that qcat makes")
        _check_known(header, arch)
    else:
        _check_other_tokenizer(metadata)
    _check_vocabulary(header)


def _check_other_tokenizer(metadata: Mapping[str, Any]) -> None:
    if metadata.get("tokenizer.ggml.model") not in OTHER_TOKENIZERS:
        found = shown(metadata.get("tokenizer.ggml.model"))
        raise DamagedError(f"tokenizer {found} is not one that qcat knows")


def _check_vocabulary(header: Header) -> None:
    metadata = header.metadata
    if metadata.get("tokenizer.ggml.model") == "llama" and any(
        metadata.get(key) != metadata.get(TOKENS) for key in (SCORES, TYPES)
    ):
        raise DamagedError("not every token has a score and a type")
    if metadata.get(TOKENS) != header.distinct_tokens:
        raise DamagedError("a token stands twice in the vocabulary, is empty, or holds a NUL")


def _made_by_converter(header: Header) -> bool:
    """Whether `qcat export --converter` made the file: qcat does not know its architecture."""
    try:
        source = json.loads(header.metadata.get(SOURCE_KEY, "{}"))
    except (ValueError, TypeError, RecursionError):
        return False
    return isinstance(source, dict) and bool(source.get("converter"))


def _check_known(header: Header, arch: str) -> None:
    """Of an architecture that qcat's own converter writes, every number is known."""
    metadata = header.metadata
    for key, value in metadata.items():
        if key == "tokenizer.ggml.model" and value != _TOKENIZERS[arch]:
            raise DamagedError(f"tokenizer {shown(value)} is not one that qcat makes")
        if not key.startswith(f"{arch}."):
            continue
        name = key.removeprefix(f"{arch}.")
        if name in _COUNTS:
            known = type(value) is int and 1 <= value <= _COUNTS[name]
        else:
            known = name in _RATES and isinstance(value, float) and 0 < value < math.inf
        if not known:
            raise DamagedError(f"metadata {shown(key)} is {shown(value)}: qcat knows no such")
    heads = metadata.get(f"{arch}.attention.head_count", 0)
    hidden = metadata.get(f"{arch}.embedding_length", 0)
    width = metadata.get(f"{arch}.attention.key_length", hidden // heads if heads else None)
    if metadata.get(f"{arch}.rope.dimension_count", width) != width:
        raise DamagedError("rope.dimension_count is not the width of a head")
    kv_heads = metadata.get(f"{arch}.attention.head_count_kv", heads)
    rows = {"attn_q": heads * (width or 0), "attn_k": kv_heads * (width or 0)}
    for tensor in header.tensors:
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if kind in rows and len(tensor.shape) == 2 and tensor.shape[1] != rows[kind]:
            raise DamagedError(f"tensor {shown(tensor.name)} does not fit the number of heads")
