"""Logits at the trie's branches to label probabilities, label mass, energy and entropy.

P(label | question) is the distribution that grammar-constrained sampling over canonical token
sequences has: at each branch a softmax over its children only, multiplied down the path.
All probabilities are computed in float64 from float32 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcat.encoding.trie import LabelTrie, ToLabel

Floats = npt.NDArray[np.float64]
_TINY = np.finfo(np.float64).tiny


class Scores(NamedTuple):
    """What a backend measures for one question."""

    logits: list[npt.NDArray[np.float32]]
    """For each of the trie's branches the logits of its tokens, shape (children,)."""
    mass: float
    """`label_mass` at the end of the prompt."""
    energy: float
    """`label_energy` at the end of the prompt."""


class BoundedScores(NamedTuple):
    """What a backend measures that cannot see every log-probability."""

    lower: Floats
    """The least that P(label | question) can be, shape (labels,); empty if nothing is known."""
    upper: Floats
    """The most that it can be, likewise; equal to `lower` where the probability is known."""
    mass: float | None
    """`label_mass`, or the least that it can be; None if nothing is known."""
    label: int
    """The answer: the most probable label, or where bounds leave that open what the model wrote."""


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
        labels[branch.to_labels.targets] = children[branch.to_labels.places]
        reached[branch.to_branches.targets] = children[branch.to_branches.places]
    return labels


def share_bounds(low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Bounds of each child's share of its branch, two arrays of shape (children,).

    A share is least when the child has its own lower bound and its siblings their upper ones, and
    most the other way round.

    Args:
        low: the least probability of each child among the whole vocabulary, shape (children,).
        high: the most, likewise.
    """
    least, most = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return (
        least / np.maximum(least + most.sum() - most, _TINY),
        most / np.maximum(most + least.sum() - least, _TINY),
    )


def label_bounds(
    trie: LabelTrie, children: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]
) -> tuple[Floats, Floats]:
    """Bounds of P(label | question), two arrays of shape (labels,).

    `share_bounds` of each branch, multiplied down the path.

    Args:
        trie: the label language.
        children: for each of `trie.branches` the least and the most probability that the model
            gives each of its `tokens` among the whole vocabulary, two arrays of shape (children,).
    """
    bounds = np.zeros((2, len(trie.sequences)), np.float64)
    reached = np.ones((2, len(trie.branches)), np.float64)
    for number, (branch, (low, high)) in enumerate(zip(trie.branches, children, strict=True)):
        shares = np.stack(share_bounds(low, high))
        values = reached[:, [number]] * shares
        bounds[:, branch.to_labels.targets] = values[:, branch.to_labels.places]
        reached[:, branch.to_branches.targets] = values[:, branch.to_branches.places]
    return bounds[0], bounds[1]


def contenders(
    trie: LabelTrie, children: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]
) -> list[int]:
    """The labels that may be the most probable one; a single one where the bounds decide.

    Decides more than `label_bounds`: which of two siblings is the more probable does not depend
    on what their common branch is divided by.

    Args:
        trie: the label language.
        children: as in `label_bounds`.
    """
    # Of each branch: its best label's share of it, at least and at most, and who that may be.
    found: list[tuple[float, float, list[int]]] = [(0.0, 0.0, [])] * len(trie.branches)
    for number in reversed(range(len(trie.branches))):
        low, high = (np.asarray(bound, np.float64) for bound in children[number])
        below = [
            (1.0, 1.0, [target.label]) if isinstance(target, ToLabel) else found[target.number]
            for target in trie.branches[number].targets
        ]
        inner_low, inner_high = (np.array([entry[i] for entry in below]) for i in (0, 1))
        least, most = low * inner_low, high * inner_high
        best = int(least.argmax())
        labels = [
            label
            for child, (_, _, labels) in enumerate(below)
            if child == best or most[child] > least[best] or least[best] == 0
            for label in labels
        ]
        share_low, share_high = share_bounds(low, high)
        found[number] = (
            float((share_low * inner_low).max()),
            float((share_high * inner_high).max()),
            labels,
        )
    return found[0][2]


def log_shares(probabilities: npt.ArrayLike) -> Floats:
    """Natural logs, of 0 that of the smallest number above it."""
    return np.asarray(np.log(np.maximum(probabilities, _TINY)), np.float64)


def temper(log_probabilities: npt.ArrayLike, temperature: float) -> Floats:
    """Label probabilities with the temperature T: p^(1/T), made to sum to 1 again.

    Guo et al. 2017, On Calibration of Modern Neural Networks; T > 1 flattens, T < 1 sharpens.

    Args:
        log_probabilities: natural logs, the labels along the last axis.
        temperature: T, more than 0.
    """
    scaled = np.asarray(log_probabilities, np.float64) / temperature
    odds = np.exp(scaled - scaled.max(-1, keepdims=True))
    return np.asarray(odds / odds.sum(-1, keepdims=True), np.float64)


def temper_bounds(lower: Floats, upper: Floats, temperature: float) -> tuple[Floats, Floats]:
    """As `temper`, of bounds: two arrays of shape (labels,)."""
    if temperature == 1:
        return lower, upper
    if not (lower < upper).any():
        known = temper(log_shares(lower), temperature)
        return known, known
    return share_bounds(lower ** (1 / temperature), upper ** (1 / temperature))


def label_mass(row: npt.NDArray[np.float32], first_tokens: npt.NDArray[np.int32]) -> float:
    """Share of the full-vocabulary softmax on the root's children, from 0 to 1.

    Low mass means that the model prefers to write something else.

    Args:
        row: logits of the whole vocabulary at the end of the prompt, shape (n_vocab,).
        first_tokens: ids of the labels' distinct first tokens.
    """
    top = row.max()
    # float32 is enough for a sum of up to 300,000 terms of at most 1, and twice as fast
    total = float(np.exp(row - top).sum())
    return min(1.0, float(np.exp(row[first_tokens] - top).sum()) / total)


def label_energy(row: npt.NDArray[np.float32], first_tokens: npt.NDArray[np.int32]) -> float:
    """Log of the sum of exponentials of the logits of the labels' first tokens.

    The negative free energy of Liu et al. 2020, Energy-based Out-of-distribution Detection, of
    the label head: high where the model knows the kind of question. Its zero is the model's own.

    Args:
        row, first_tokens: as for `label_mass`.
    """
    logits = row[first_tokens].astype(np.float64)
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()))


def entropy(probabilities: Floats) -> float:
    """Shannon entropy in nats: 0 for a certain answer, log(labels) for a guess."""
    positive = probabilities[probabilities > 0]
    return float(max(0.0, -(positive * np.log(positive)).sum()))
