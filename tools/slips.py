"""Slips of the keyboard, for the tests and the benchmark of drift."""

from __future__ import annotations

import random


def slipped(text: str) -> str:
    """The text with two neighbouring letters swapped in every second word or so, always alike."""
    rng = random.Random(text)
    words = text.split()
    for number, word in enumerate(words):
        if len(word) > 3 and rng.random() < 0.5:
            at = rng.randrange(1, len(word) - 2)
            words[number] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)
