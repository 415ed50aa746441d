"""Finds near duplicates by TF-IDF over characters. Needs scikit-learn."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

NEAR = 0.85
"""Cosine of two questions' TF-IDF vectors of 3- to 5-character n-grams. On CLINC150 and Banking77
pairs above it differ in a word at most or in their order; below 0.8 most mean different things."""
_BATCH = 512  # rows whose distances to all others are in memory at once

Pair = tuple[int, int, float]
"""Two indices, the lower one first, and the likeness of what they stand for."""


def near_pairs(
    texts: Sequence[str], labels: Sequence[Hashable], units: Sequence[Hashable]
) -> list[Pair]:
    """Texts at least `NEAR` alike: each with the closest of another label, and with the closest
    of its label and another unit.

    Punctuation is ignored, case is not. The result is exact; at most `_BATCH` rows of the distance
    matrix are in memory at once.
    """
    import numpy as np

    label, unit = (np.array(_numbered(names)) for names in (labels, units))
    pairs: dict[tuple[int, int], float] = {}
    for at, (far, near) in enumerate(_neighbours(texts, len(texts))):
        conflict = label[near] != label[at]
        for chosen in (conflict, ~conflict & (unit[near] != unit[at])):
            if chosen.any():
                closest = np.argmin(np.where(chosen, far, np.inf))
                other = int(near[closest])
                pairs[min(at, other), max(at, other)] = 1 - float(far[closest])
    return [(one, two, likeness) for (one, two), likeness in pairs.items()]


def near_texts(texts: Sequence[str], others: Sequence[str]) -> list[list[int]]:
    """For each text, all that are at least `NEAR` alike, itself too: their indices among the texts
    and, counted on from there, the others. Case and punctuation do not count.
    """
    folded = [text.casefold() for text in (*texts, *others)]
    return [near.tolist() for _, near in _neighbours(folded, len(texts))]


def near_groups(texts: Sequence[str]) -> list[int]:
    """For each text the least index in its group, which a chain of texts at least `NEAR` alike
    holds together. Case and punctuation do not count.
    """
    import numpy as np

    groups = np.arange(len(texts))
    for _, near in _neighbours([text.casefold() for text in texts], len(texts)):
        joined = np.unique(groups[near])
        if len(joined) > 1:
            groups[np.isin(groups, joined)] = joined[0]
    return [int(first) for first in groups]


def _neighbours(texts: Sequence[str], count: int) -> Iterator[tuple[Any, Any]]:
    """For each of the first `count` texts, the distances and indices of those at least `NEAR`."""
    if not count:
        return
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(3, 5), lowercase=False, dtype=np.float32
    )
    vectors = vectorizer.fit_transform(f" {_bare(text)} " for text in texts)
    index = NearestNeighbors(metric="cosine", algorithm="brute", radius=1 - NEAR).fit(vectors)
    for start in range(0, count, _BATCH):
        found = index.radius_neighbors(vectors[start : min(count, start + _BATCH)])
        yield from zip(*found, strict=True)


def families(pairs: Sequence[Pair]) -> list[tuple[list[int], Pair]]:
    """The sets of indices that pairs connect, each with its closest pair, in order."""
    if not pairs:
        return []
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    one, two, likeness = zip(*pairs, strict=True)
    size = max(two) + 1
    graph = coo_array((likeness, (one, two)), shape=(size, size))
    component = connected_components(graph, directed=False)[1]
    members: defaultdict[int, set[int]] = defaultdict(set)
    closest: dict[int, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: -pair[2]):
        number = int(component[pair[0]])
        members[number].update(pair[:2])
        closest.setdefault(number, pair)
    return sorted((sorted(indices), closest[number]) for number, indices in members.items())


def _numbered(names: Sequence[Hashable]) -> list[int]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def _bare(text: str) -> str:
    """Without punctuation, unless there is nothing else."""
    words = "".join(" " if unicodedata.category(char)[0] == "P" else char for char in text)
    return " ".join(words.split()) or text
