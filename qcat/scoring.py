"""Logits at the trie's branches to label probabilities, label mass, margin and entropy.

P(label | question) is the distribution that grammar-constrained sampling over canonical token
sequences has: at each branch a softmax over its children only, multiplied down the path.
All probabilities are computed in float64 from float32 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcat.trie import LabelTrie

Floats = npt.NDArray[np.float64]


class Scores(NamedTuple):
    """What a backend measures for one question."""

    logits: list[npt.NDArray[np.float32]]
    """For each of the trie's branches the logits of its tokens, shape (children,)."""
    mass: float
    """`label_mass` at the end of the prompt."""


def log_softmax(logits: npt.ArrayLike) -> Floats:
    """Natural log-softmax of a vector of logits, shape (n,)."""
    values = np.asarray(logits, np.float64)
    shifted = values - values.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float64)


def label_log_probabilities(trie: LabelTrie, logits: Sequence[npt.ArrayLike]) -> Floats:
    """log P(label | question), shape (labels,).

    Args:
        trie: the label language.
        logits: for each of `trie.branches`, the logits of its `tokens`, shape (children,).
    """
    labels = np.zeros(len(trie.sequences), np.float64)
    reached = np.zeros(len(trie.branches), np.float64)
    for number, (branch, values) in enumerate(zip(trie.branches, logits, strict=True)):
        children = reached[number] + log_softmax(values)
        for target, value in zip(branch.targets, children, strict=True):
            if target >= 0:
                labels[target] = value
            else:
                reached[-1 - target] = value
    return labels


def label_mass(row: npt.NDArray[np.float32], first_tokens: npt.NDArray[np.int32]) -> float:
    """Share of the full-vocabulary softmax on the root's children, from 0 to 1.

    Low mass means that the model wanted to say something else.

    Args:
        row: logits of the whole vocabulary at the end of the prompt, shape (n_vocab,).
        first_tokens: ids of the labels' distinct first tokens.
    """
    top = row.max()
    # float32 is enough for a sum of up to 300,000 terms of at most 1, and twice as fast
    total = float(np.exp(row - top).sum())
    return min(1.0, float(np.exp(row[first_tokens] - top).sum()) / total)


def margin(probabilities: Floats) -> float:
    """The best probability less the second best, from 0 to 1."""
    second, best = np.partition(probabilities, -2)[-2:]
    return float(best - second)


def entropy(probabilities: Floats) -> float:
    """Shannon entropy in nats: 0 for a certain answer, log(labels) for a guess."""
    positive = probabilities[probabilities > 0]
    return float(max(0.0, -(positive * np.log(positive)).sum()))
