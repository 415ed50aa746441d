"""The tokenizer of a GGUF as `tokenizer.json`, compared with llama.cpp on the file itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcat.encoding.agreement import check_rebuilt
from qcat.encoding.tokenization import PRE_TOKENIZERS, HubTokenizer
from qcat.errors import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # gguf.TokenType


def write_tokenizer(gguf: Path, metadata: Mapping[str, Any], rows: int, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        gguf: the file, for messages.
        metadata: its own, whole.
        rows: of its embedding.
        folder: where to write.

    Raises:
        ModelError: a tokenizer that transformers and llama.cpp would not read alike.
    """
    from tokenizers import Tokenizer

    spec = _spec(gguf, metadata, rows)
    try:
        Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise _cannot(gguf, f"its tokenizer cannot be rebuilt: {error}") from None
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {}
    for role, name in (("eos", "eos"), ("bos", "bos"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and 0 <= number < len(tokens):
            roles[f"{role}_token"] = tokens[number]
    if "eos_token" not in roles:
        raise _cannot(gguf, "its tokenizer names no end token")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def _spec(gguf: Path, metadata: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What `tokenizer.json` says."""
    kind = metadata.get("tokenizer.ggml.model")
    rule = str(metadata.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or rule not in PRE_TOKENIZERS:
        raise _cannot(
            gguf,
            f"tokenizer {kind!r} with rule {rule!r} cannot be rebuilt: byte-level BPE with "
            f"{' or '.join(PRE_TOKENIZERS)} can",
        )
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    merges = metadata.get("tokenizer.ggml.merges") or []
    if len(types) != len(tokens) or len(tokens) != rows:
        raise _cannot(gguf, "its vocabulary does not fit its embedding")
    kept = {i: kind for i, kind in enumerate(types) if kind != _UNUSED}
    added = [
        {
            "id": number,
            "content": tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for number, kind in kept.items()
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,  # llama.cpp has none
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[rule]},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {tokens[number]: number for number in kept},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def check_tokenizer(gguf: Path, folder: Path, texts: Sequence[str]) -> None:
    """Assert that the rebuilt tokenizer gives the ids that llama.cpp gives on the file itself.

    Args:
        gguf: the base, which `gguf_checkpoint` has taken.
        folder: of the checkpoint that was made of it.
        texts: to be compared, besides some awkward ones.

    Raises:
        ExportError: at the first text where they differ, with both ids.
    """
    from qcat.backends.llama import LlamaModel

    with LlamaModel(gguf, vocab_only=True) as model:
        check_rebuilt(HubTokenizer(folder), model, texts)


def _cannot(gguf: Path, why: str) -> ModelError:
    return ModelError(f"base {gguf}: cannot be used: {why}")
