"""A Hugging Face byte-level BPE tokenizer to GGUF: tokens, merges, types, special ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qcat.encoding.tokenization import QWEN2_SPLIT, HubTokenizer, is_control
from qcat.errors import ExportError

# gguf.TokenType, by what llama.cpp does with each
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Pairs, best first, as `left right`."""
    pre_tokenizer: str
    """llama.cpp's name for the splitting rule."""
    eos: int
    bos: int | None
    pad: int | None


def read_vocabulary(tokenizer: HubTokenizer, size: int) -> Vocabulary:
    """Everything of a tokenizer that llama.cpp needs.

    Args:
        tokenizer: as read from the model's folder.
        size: rows of the embedding; ids beyond the tokenizer's are padded as unused.

    Raises:
        ExportError: a tokenizer that llama.cpp would not follow, with what is unusual in it.
    """
    spec, where = tokenizer.spec, tokenizer.folder / "tokenizer.json"
    model = spec["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(f"{where}: byte-level BPE expected, found {model.get('type')}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise ExportError(f"{where}: {key} is set: llama.cpp would not follow it")
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        raise ExportError(
            f"{where}: normalizer {json.dumps(spec['normalizer'])[:80]}: only NFC can be followed"
        )
    by_id: dict[int, tuple[str, int]] = {
        number: (token, NORMAL) for token, number in model["vocab"].items()
    }
    for added in spec["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ExportError(
                f"{where}: added token {added['content']!r} strips its surroundings: "
                "llama.cpp cannot do that"
            )
        kind = CONTROL if is_control(added) else USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    if max(by_id) >= size:
        raise ExportError(
            f"{where}: token id {max(by_id)}, but the model's embedding has {size} rows: "
            "resize the embedding or take the tokenizer that belongs to it"
        )
    padded = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary(
        tokens=[token for token, _ in padded],
        types=[kind for _, kind in padded],
        merges=merges,
        pre_tokenizer=_pre_tokenizer(spec, str(where)),
        eos=tokenizer.end,
        bos=tokenizer.token_id("bos_token"),
        pad=tokenizer.token_id("pad_token"),
    )


def _pre_tokenizer(spec: dict[str, Any], where: str) -> str:
    """llama.cpp's name for a pre-tokenizer, told by its rules, not by the model's name."""
    steps = spec["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    match steps:
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if regex == QWEN2_SPLIT:
            return "qwen2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return "smollm"
    raise ExportError(
        f"{where}: pre-tokenizer {json.dumps(steps)[:120]}… is neither Qwen2's nor SmolLM's: "
        "llama.cpp would split words otherwise"
    )
