"""Texts that differ only in spelling, and labels that look the same."""

from __future__ import annotations

import re
import unicodedata

INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
"""Characters that are invisible and that no script needs."""
# Those, and characters that select an emoji's form or the writing direction
_UNSEEN = re.compile(
    "[\u00ad\u200b\u2060\ufeff\u180b-\u180d\ufe00-\ufe0f\U000e0100-\U000e01ef"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
# Cyrillic and Greek letters that look like a Latin one in most fonts, after folding
_LOOKALIKES = dict(zip("аеорсухіјѕһԁԛԝοανικρυ", "aeopcyxijshdqwoavikpu", strict=True))
_TO_LATIN = str.maketrans(_LOOKALIKES)


def fold(text: str) -> str:
    """A text with case folded and runs of white space collapsed."""
    # Folding can undo NFC, so normalise again: "ǰ" and its equivalents must match.
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


def looks(text: str) -> str:
    """How a folded text looks: without invisible characters, lookalikes as Latin letters."""
    return fold(_UNSEEN.sub("", text)).translate(_TO_LATIN)


def difference(one: str, two: str) -> str:
    """How two texts with the same `looks` differ."""
    if fold(one) == fold(two):
        return "differ only in case or spacing"
    for text in (one, two):
        if hidden := _UNSEEN.search(text):
            return f"differ in the invisible U+{ord(hidden[0]):04X}"
    foreign = next(char for char in fold(one) + fold(two) if char in _LOOKALIKES)
    return f"look the same, but one has a {unicodedata.name(foreign)}"
