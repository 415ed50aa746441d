"""How training questions are varied, and lines without labels added to them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from as_typed import as_typed, capitals, slips, telegram
from hypothesis import given
from hypothesis import strategies as st
from make_with_teachers import SURE, UNKNOWN, UNSURE, sure, unknown


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


def test_lines_are_taken_where_the_teachers_are_sure_or_know_nothing():
    lines = [f"line {number}" for number in range(1000)]
    shares = np.full((1000, 4), 0.25, np.float32)
    shares[:10] = [0.05, SURE, 0.05, 0.1]
    shares[10:20] = [0.1, 0.5, 0.2, 0.2]
    assert UNSURE < 0.5
    taken = sure(lines, shares)
    assert [example.text for example in taken] == lines[:10]
    assert {example.label for example in taken} == {1}
    none = unknown(lines, shares, random.Random(0))
    assert len({example.text for example in none}) == UNKNOWN
    assert not {example.text for example in none} & {*lines[:20]}
    assert max(Counter(example.label for example in none).values()) < UNKNOWN / 2
