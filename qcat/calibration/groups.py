"""Paraphrases count once wherever questions are assumed to be independent."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

_SEED = 0


def one_of_each(groups: Sequence[Hashable | None]) -> list[int]:
    """One question of each group and all questions without a group, as row indices in order.

    They are drawn at random with a fixed seed, because the first question of a group may be worded
    more carefully than the others.

    Args:
        groups: the group of each question; None if it has none.
    """
    rows = list(range(len(groups)))
    random.Random(_SEED).shuffle(rows)
    kept = {("alone", row) if groups[row] is None else ("group", groups[row]): row for row in rows}
    return sorted(kept.values())
