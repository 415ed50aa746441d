"""Runs the merged model in torch like the runtime does: the reference for the verification.

All questions go through one layer before the next is needed. In each layer the prefix comes first;
its keys and values are shared by all questions, and a question's by the label tokens after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcat.encoding.scoring import Floats, label_log_probabilities
from qcat.encoding.trie import LabelTrie
from qcat_convert.decoder import OneLayer
from qcat_convert.weights import Rows

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = 512  # in one forward pass: more takes memory and gains nothing on a CPU


@dataclass
class _Batch:
    """Questions of one length."""

    rows: list[int]
    """Which they are."""
    states: torch.Tensor
    """(rows, tokens, hidden)."""
    after: list[torch.Tensor]
    """For each of the paths, likewise."""


class Replay:
    """Hidden states of questions after one prefix, carried from layer to layer.

    Args:
        prefix: token ids that all questions share.
        rests: token ids after it, one sequence a question.
        paths: token sequences to be tried after every question.
    """

    def __init__(
        self,
        prefix: Sequence[int],
        rests: Sequence[Sequence[int]],
        paths: Sequence[Sequence[int]] = (),
    ) -> None:
        self._given, self._rests = list(prefix), [list(rest) for rest in rests]
        wanted = sorted({tuple(path) for path in paths}, key=len, reverse=True)
        # The start of a longer path is evaluated together with it.
        self._paths: list[tuple[int, ...]] = []
        for path in wanted:
            if not any(longer[: len(path)] == path for longer in self._paths):
                self._paths.append(path)

    def start(self, embedding: Rows, scale: float) -> None:
        """Look all tokens up.

        Args:
            embedding: the token embeddings.
            scale: what the model multiplies them with.
        """
        import torch

        sequences = (self._given, *self._rests, *self._paths)
        ids = sorted({token for tokens in sequences for token in tokens})
        place = {token: number for number, token in enumerate(ids)}
        table = embedding.take(ids) * scale

        def look_up(rows: Sequence[Sequence[int]]) -> torch.Tensor:
            return table[torch.tensor([[place[token] for token in tokens] for tokens in rows])]

        self._prefix = look_up([self._given])
        self._batches = [
            _Batch(
                rows,
                look_up([self._rests[row] for row in rows]),
                [look_up([path] * len(rows)) for path in self._paths],
            )
            for rows in self._of_one_length()
        ]

    def step(self, one: OneLayer, layer: Any) -> None:
        """Run everything through the next layer."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        self._prefix = one.run(layer, self._prefix, cache)
        keys, values = cache.layers[0].keys, cache.layers[0].values
        for batch in self._batches:
            shape = (len(batch.rows), -1, -1, -1)
            shared = DynamicCache()
            shared.update(keys.expand(shape), values.expand(shape), 0)
            batch.states = one.run(layer, batch.states, shared)
            for number, path in enumerate(self._paths):
                batch.after[number] = one.run(layer, batch.after[number], shared)
                shared.crop(-len(path))

    def prefix_end(self, norm: Any) -> torch.Tensor:
        """What the head sees at the prefix's last token, (1, hidden)."""
        return self._normed(norm, self._prefix[:, -1])

    def ends(self, norm: Any, path: Sequence[int] = ()) -> torch.Tensor:
        """What the head sees at the last token of a path, or of the question: (questions, hidden).

        Args:
            norm: the model's last norm.
            path: one of those given, or empty.
        """
        import torch

        found = torch.empty(len(self._rests), self._prefix.shape[-1])
        for batch in self._batches:
            if path:
                number = next(
                    number
                    for number, carried in enumerate(self._paths)
                    if carried[: len(path)] == tuple(path)
                )
                found[batch.rows] = batch.after[number][:, len(path) - 1]
            else:
                found[batch.rows] = batch.states[:, -1]
        return self._normed(norm, found)

    def _of_one_length(self) -> Iterator[list[int]]:
        order = sorted(range(len(self._rests)), key=lambda row: len(self._rests[row]))
        batch: list[int] = []
        for row in order:
            length = len(self._rests[row])
            same = not batch or len(self._rests[batch[0]]) == length
            if batch and (not same or (len(batch) + 1) * length > _BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @staticmethod
    def _normed(norm: Any, states: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return torch.as_tensor(norm(states))


def label_distributions(replay: Replay, trie: LabelTrie, norm: Any, head: Rows) -> Floats:
    """Label log-probabilities at the end of the last layer, shape (questions, labels).

    Args:
        replay: with the paths of the trie's branches.
        trie: the label language.
        norm: the model's last norm.
        head: its rows; those of the trie's tokens alone are read.
    """
    logits = [
        (replay.ends(norm, branch.path) @ head.take(branch.tokens.tolist()).T).numpy()
        for branch in trie.branches
    ]
    rows = zip(*logits, strict=True)
    return np.stack([label_log_probabilities(trie, row) for row in rows])
