"""A Hugging Face BPE tokenizer to GGUF: tokens, merges or scores, types, special ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qcat.encoding.tokenization import (
    BYTE_TOKEN,
    QWEN2_SPLIT,
    SPACES,
    SPLIT_SPACES,
    HubTokenizer,
    is_control,
    is_sentencepiece,
)
from qcat.errors import ExportError

# gguf.TokenType, by what llama.cpp does with each
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    model: str
    """llama.cpp's name for the kind: `gpt2` for byte-level BPE, `llama` for SentencePiece."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Pairs, best first, as `left right`; none of SentencePiece."""
    scores: list[float]
    """Of SentencePiece: the higher, the sooner a token is merged; else none."""
    pre_tokenizer: str
    """llama.cpp's name for the splitting rule."""
    eos: int
    bos: int | None
    pad: int | None
    unknown: int | None


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
    if model.get("type") != "BPE":
        raise ExportError(f"{where}: BPE expected, found {model.get('type')}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise ExportError(f"{where}: {key} is set: llama.cpp would not follow it")
    sentencepiece = is_sentencepiece(spec)
    allowed: list[Any] = [SPACES] if sentencepiece else [None, {"type": "NFC"}]
    if spec["normalizer"] not in allowed:
        raise ExportError(
            f"{where}: normalizer {json.dumps(spec['normalizer'])[:80]}: only "
            f"{'that of spaces' if sentencepiece else 'NFC'} can be followed"
        )
    by_id: dict[int, tuple[str, int]] = {
        number: (token, _kind(token, model) if sentencepiece else NORMAL)
        for token, number in model["vocab"].items()
    }
    for added in spec["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ExportError(
                f"{where}: added token {added['content']!r} strips its surroundings: "
                "llama.cpp cannot do that"
            )
        kind = CONTROL if is_control(added) else USER_DEFINED
        if added["content"] == model.get("unk_token"):
            kind = UNKNOWN
        by_id[added["id"]] = (added["content"], kind)
    if max(by_id) >= size:
        raise ExportError(
            f"{where}: token id {max(by_id)}, but the model's embedding has {size} rows: "
            "resize the embedding or take the tokenizer that belongs to it"
        )
    padded = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens = [token for token, _ in padded]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        tokens=tokens,
        types=[kind for _, kind in padded],
        merges=[] if sentencepiece else [" ".join(pair) for pair in pairs],
        scores=_scores(tokens, pairs) if sentencepiece else [],
        pre_tokenizer=_pre_tokenizer(spec, str(where)),
        eos=tokenizer.end,
        bos=tokenizer.token_id("bos_token"),
        pad=tokenizer.token_id("pad_token"),
        unknown=tokens.index(model["unk_token"]) if sentencepiece else None,
    )


def _kind(token: str, model: dict[str, Any]) -> int:
    """What llama.cpp does with a token of SentencePiece."""
    if token == model.get("unk_token"):
        return UNKNOWN
    return BYTE if BYTE_TOKEN.fullmatch(token) else NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores under which llama.cpp merges in the order of the merges.

    It merges the pair whose result has the highest score; SentencePiece stores less for each later
    merge, and so does this. What no merge makes never competes.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _pre_tokenizer(spec: dict[str, Any], where: str) -> str:
    """llama.cpp's name for a pre-tokenizer, told by its rules, not by the model's name."""
    if is_sentencepiece(spec):
        if spec["pre_tokenizer"] in (None, SPLIT_SPACES):
            return "default"
        raise ExportError(f"{where}: pre-tokenizer of another SentencePiece than Gemma's")
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
