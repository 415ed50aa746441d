"""The label language as a trie of tokens: which tokens may follow which.

Only branching nodes are kept, since a node with one child costs no forward pass. Independent of
models: it is built from token ids and used by `qcat.encoding.scoring` and the backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcat.errors import ModelError


class ToLabel(NamedTuple):
    """A child that ends a label, or from which only one label can be reached."""

    label: int


class ToBranch(NamedTuple):
    """A child below which another branch comes."""

    number: int
    """Among `LabelTrie.branches`."""


class Children(NamedTuple):
    """Some children of a branch and where each leads, two arrays of one shape."""

    places: npt.NDArray[np.int64]
    """Among the branch's tokens."""
    targets: npt.NDArray[np.int64]
    """Labels, or numbers of branches."""


@dataclass(frozen=True)
class Branch:
    """A node with two or more children."""

    path: tuple[int, ...]
    """Tokens from the root to this node."""
    tokens: npt.NDArray[np.int32]
    """Shape (children,): the tokens that may follow, the end token among them if a label ends."""
    targets: tuple[ToLabel | ToBranch, ...]
    """For each child where it leads."""

    @cached_property
    def to_labels(self) -> Children:
        """The children that lead to a label."""
        return self._children(ToLabel)

    @cached_property
    def to_branches(self) -> Children:
        """The children that lead to another branch."""
        return self._children(ToBranch)

    def _children(self, kind: type[ToLabel | ToBranch]) -> Children:
        rows = [(place, t[0]) for place, t in enumerate(self.targets) if isinstance(t, kind)]
        places, targets = np.array(rows, np.int64).reshape(-1, 2).T
        return Children(places, targets)


@dataclass(frozen=True)
class LabelTrie:
    """All labels' token sequences. `branches` holds each parent before its children."""

    sequences: tuple[tuple[int, ...], ...]
    """Label tokens, in label order, without the end token."""
    end: int
    """The end token. It competes where one label's tokens begin another's."""
    branches: tuple[Branch, ...]
    first_tokens: npt.NDArray[np.int32]
    """The distinct first tokens: the root's children."""

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]], end: int) -> LabelTrie:
        """Build from one token sequence per label.

        Raises:
            ModelError: if a sequence is empty, holds the end token, or stands for two labels.
        """
        given = tuple(tuple(sequence) for sequence in sequences)
        for index, sequence in enumerate(given):
            if not sequence or end in sequence:
                raise ModelError(f"label {index + 1} has no usable tokens in this vocabulary")
        if len(set(given)) < len(given):
            raise ModelError("two labels have the same tokens in this vocabulary: rename one")
        branches: list[Branch | None] = []

        def grow(path: tuple[int, ...], labels: list[int]) -> ToLabel | ToBranch:
            """Add the subtree of the labels that begin with `path`; return where it leads."""
            while True:
                children: dict[int, list[int]] = {}
                for label in labels:
                    rest = given[label][len(path) :]
                    children.setdefault(rest[0] if rest else end, []).append(label)
                if len(labels) == 1:
                    return ToLabel(labels[0])
                if len(children) > 1:
                    break
                path += (next(iter(children)),)
            number = len(branches)
            branches.append(None)  # keeps the parent before its children
            targets = [
                ToLabel(group[0]) if len(group) == 1 else grow((*path, token), group)
                for token, group in children.items()
            ]
            branches[number] = Branch(path, np.array(list(children), np.int32), tuple(targets))
            return ToBranch(number)

        grow((), list(range(len(given))))
        firsts = np.array(list(dict.fromkeys(sequence[0] for sequence in given)), np.int32)
        return cls(given, end, tuple(b for b in branches if b is not None), firsts)

    @property
    def root_branch(self) -> Branch | None:
        """The branch at the root, scored by the question's own forward pass, if there is one."""
        return self.branches[0] if self.branches and not self.branches[0].path else None

    @property
    def deep_branches(self) -> tuple[Branch, ...]:
        """The branches below the root, scored together in as few additional passes as possible."""
        return tuple(branch for branch in self.branches if branch.path)

    @cached_property
    def children(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """For every path in the trie the tokens that may follow, the end token included."""
        following: dict[tuple[int, ...], dict[int, None]] = {}
        for sequence in self.sequences:
            tokens = (*sequence, self.end)
            for depth, token in enumerate(tokens):
                following.setdefault(tokens[:depth], {})[token] = None
        return {path: tuple(tokens) for path, tokens in following.items()}
