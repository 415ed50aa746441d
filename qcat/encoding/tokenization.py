"""A Hugging Face tokenizer that gives the ids that the GGUF runtime gives.

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
_MARKUP = re.compile(r"<[^<>\s]+>")


def is_control(added: Mapping[str, Any]) -> bool:
    """Whether an entry of `added_tokens` is a control token, never to be found in user text.

    Special tokens are, and so is anything written like markup (`<think>`, `<tool_call>`), which
    Qwen3 does not mark special. Words that a user added are not: they stand for themselves.
    """
    return bool(added["special"]) or _MARKUP.fullmatch(added["content"]) is not None


class HubTokenizer:
    """The tokenizer of a model folder, as an `Encoder`.

    Args:
        folder: holds `tokenizer.json` and, for the end token's name, `tokenizer_config.json`.
        spec: what to take in the place of `tokenizer.json`, as it would be read from there.

    Raises:
        ModelError: a file is absent or unreadable, or no end token is named.
    """

    def __init__(self, folder: Path, spec: dict[str, Any] | None = None) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        self.spec = _read_json(folder / "tokenizer.json") if spec is None else spec
        self.config = _read_json(folder / "tokenizer_config.json")
        marked = [{**added, "special": is_control(added)} for added in self.spec["added_tokens"]]
        text = json.dumps({**self.spec, "added_tokens": marked})
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{folder / 'tokenizer.json'}: {error}") from None
        end = self.token_id("eos_token")
        if end is None:
            raise ModelError(f"{folder / 'tokenizer_config.json'}: no eos_token: name one")
        self.end: int = end

    def token_id(self, role: str) -> int | None:
        """Id of the token in a role of `tokenizer_config.json`, such as `eos_token`."""
        name = self.config.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        return None if name is None else self._tokenizer.token_to_id(name)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids, without a begin or end token; control tokens only where `special`."""
        # the library's name for "as plain text"
        self._tokenizer.encode_special_tokens = not special
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror}: save the model's tokenizer there with save_pretrained"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: a JSON object expected")
    return data
