"""The tokenizer of a GGUF as `tokenizer.json`, compared with llama.cpp on the file itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcat.encoding.agreement import AWKWARD, check_texts
from qcat.encoding.tokenization import PRE_TOKENIZERS, SPACES, HubTokenizer
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
    byte_level = kind == "gpt2" and rule in PRE_TOKENIZERS
    if not byte_level and (kind != "llama" or metadata.get("tokenizer.ggml.add_space_prefix", 1)):
        raise _cannot(
            gguf,
            f"tokenizer {kind!r} with rule {rule!r} cannot be rebuilt: byte-level BPE with "
            f"{' or '.join(PRE_TOKENIZERS)} can, and SentencePiece without a space before a text",
        )
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
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
    vocab = {tokens[number]: number for number in kept}
    how = _byte_level(rule, metadata) if byte_level else _sentencepiece(gguf, metadata, kept)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        **how.pop("model"),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        "model": model,
        **how,
    }


def _byte_level(rule: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is particular to byte-level BPE."""
    merges = metadata.get("tokenizer.ggml.merges") or []
    return {
        "normalizer": None,  # llama.cpp has none
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[rule]},
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"merges": [merge.split(" ") for merge in merges]},
    }


def _sentencepiece(
    gguf: Path, metadata: Mapping[str, Any], kept: Mapping[int, int]
) -> dict[str, Any]:
    """What is particular to SentencePiece's BPE.

    It has no merges but scores: the pair is merged whose result has the highest. So each way to
    put a token together of two others is a merge, in the order of the scores; that is how
    transformers too converts such a vocabulary.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata.get("tokenizer.ggml.scores") or []
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if len(scores) != len(tokens) or unknown not in kept:
        raise _cannot(gguf, "its tokenizer lacks scores or the unknown token")
    words = {tokens[n] for n, kind in kept.items() if kind in (_NORMAL, _USER_DEFINED)}
    merges = []
    for number in sorted(kept, key=lambda number: -scores[number]):
        token = tokens[number]
        if token in words:
            pairs = ([token[:at], token[at:]] for at in range(1, len(token)))
            merges += [pair for pair in pairs if words.issuperset(pair)]
    return {
        "normalizer": dict(SPACES),
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "unk_token": tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": merges,
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
        rebuilt = HubTokenizer(folder)
        check_texts("the tokenizer rebuilt from the GGUF", rebuilt, model, [*AWKWARD, *texts])


def _cannot(gguf: Path, why: str) -> ModelError:
    return ModelError(f"base {gguf}: cannot be used: {why}")
