"""A Hugging Face tokenizer that returns the same ids as the GGUF runtime.

For training and conversion. Reads `tokenizer.json` itself, the file that fast tokenizers are made
of, because transformers may rebuild the pre-tokenizer from the class name. Needs `tokenizers`
(it comes with transformers), imported when one is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcat.errors import ModelError
from qcat.files import read_json

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "qwen2": [
        {
            "type": "Split",
            "pattern": {"Regex": QWEN2_SPLIT},
            "behavior": "Isolated",
            "invert": False,
        },
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
    ],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
"""Splitting rules that llama.cpp follows, by its names, as `tokenizer.json` spells them."""
SPACES: Mapping[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
"""SentencePiece's normalizer: a space is written as U+2581."""
SPLIT_SPACES: Mapping[str, Any] = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""Gemma's pre-tokenizer, which finds no space to split at any more."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte in SentencePiece's vocabulary, for what has no token."""
_MARKUP = re.compile(r"<[^<>\s]+>")


def is_control(added: Mapping[str, Any]) -> bool:
    """Whether an entry of `added_tokens` is a control token, never to be found in user text.

    Special tokens are, and so is anything written like markup (`<think>`, `<tool_call>`), which
    Qwen3 does not mark special. Words that a user added are not: they stand for themselves.
    """
    return bool(added["special"]) or _MARKUP.fullmatch(added["content"]) is not None


def is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` is of SentencePiece's BPE, as Gemma's is."""
    return bool(spec["model"].get("byte_fallback"))


class HubTokenizer:
    """The tokenizer of a model folder, as an `Encoder`.

    Args:
        folder: holds `tokenizer.json` and, for the end token's name, `tokenizer_config.json`.
        spec: content to use instead of that of `tokenizer.json`.

    Raises:
        ModelError: a file is missing or unreadable, or no end token is named.

    Padding, truncation and dropout in `tokenizer.json` are left over from earlier calls. Token ids
    must not depend on them, so they are ignored.
    """

    def __init__(self, folder: Path, spec: dict[str, Any] | None = None) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        path = folder / "tokenizer.json"
        self.spec = _plain(path, _read(path) if spec is None else spec)
        self.config = _read(folder / "tokenizer_config.json")
        marked = [{**added, "special": is_control(added)} for added in self.spec["added_tokens"]]
        text = json.dumps({**self.spec, "added_tokens": marked})
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: {error}") from None
        end = self.token_id("eos_token")
        if end is None:
            raise ModelError(f"{folder / 'tokenizer_config.json'}: no eos_token: name one")
        self.end: int = end
        begins = is_sentencepiece(self.spec) and self.token_id("bos_token") is not None
        self.begin: str | None = self._name("bos_token") if begins else None
        """The token that every prompt begins with, as text. Models with SentencePiece were trained
        so, and without it answer nonsense."""

    def token_id(self, role: str) -> int | None:
        """Id of the token in a role of `tokenizer_config.json`, such as `eos_token`."""
        name = self._name(role)
        return None if name is None else self._tokenizer.token_to_id(name)

    def _name(self, role: str) -> str | None:
        name = self.config.get(role)
        return name.get("content") if isinstance(name, dict) else name

    def tokens(self) -> dict[str, int]:
        """All tokens, added ones too, with their ids."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids, without a begin or end token; control tokens only where `special`."""
        # the library's name for "as plain text"
        self._tokenizer.encode_special_tokens = not special
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _read(path: Path) -> dict[str, Any]:
    advice = "save the model's tokenizer there with save_pretrained"
    return read_json(path, error=ModelError, advice=advice)


def _plain(path: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `tokenizer.json` without settings that make ids differ between calls."""
    model, added = spec.get("model"), spec.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ModelError(f"{path}: has no vocabulary: save the tokenizer with save_pretrained")
    if not isinstance(added, list) or not all(map(_is_added, added)):
        raise ModelError(f"{path}: added_tokens are not what the tokenizers library writes")
    return {
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": None,
        **spec,
        "added_tokens": added,
        "padding": None,
        "truncation": None,
        "post_processor": None,  # begin and end tokens, which are not wanted
        "model": {**model, "dropout": None},
    }


def _is_added(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and type(entry.get("id")) is int
        and all(
            type(entry.setdefault(key, False)) is bool
            for key in ("special", "lstrip", "rstrip", "single_word")
        )
    )
