"""How training questions of the shipped model are varied."""

from __future__ import annotations

import random
from collections import Counter

from as_typed import as_typed, capitals, slips, telegram
from hypothesis import given
from hypothesis import strategies as st


def test_examples():
    assert capitals("who fixed the sprinklers?") == "WHO FIXED THE SPRINKLERS"
    assert telegram("When was the pool pump last replaced?") == "pool pump last replaced"
    assert telegram("is it on?") == "is it on?"


@given(st.text(max_size=80), st.integers(0, 1000))
def test_a_text_stays_nearly_what_it_was(text, seed):
    assert as_typed(text, random.Random(seed)) == as_typed(text, random.Random(seed))
    slipped = slips(text, random.Random(seed))
    changed = Counter(slipped)
    changed.subtract(text)
    assert sum(abs(count) for count in changed.values()) <= 2  # one letter for each of two slips
    assert slipped[:1] == text[:1]
    assert {*telegram(text).split()} <= {*text.split(), *telegram(text.lower()).split()}
