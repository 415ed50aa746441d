"""Paraphrases of each other count once where questions are taken as independent."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

_SEED = 0


def one_of_each(groups: Sequence[Hashable | None]) -> list[int]:
    """One question of each group and all without a group, as rows in their order.

    Drawn, always the same: the first of a group may be worded with more care than the others.

    Args:
        groups: of each question; None if it has none.
    """
    rows = list(range(len(groups)))
    random.Random(_SEED).shuffle(rows)
    kept = {("alone", row) if groups[row] is None else ("group", groups[row]): row for row in rows}
    return sorted(kept.values())
