"""The merged model in torch, asked as the runtime asks: the reference that the proof compares with.

The prefix is evaluated once and kept in the key-value cache, which is cut back after each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcat.scoring import Scores, label_energy, label_mass
from qcat.trie import LabelTrie


class TorchReplay:
    """A causal language model in torch with a task's prefix.

    Args:
        model: a transformers model in evaluation mode.
        prefix: token ids of the prompt up to the question.
        trie: the label language.
    """

    def __init__(self, model: Any, prefix: Sequence[int], trie: LabelTrie) -> None:
        self.model, self._prefix, self._trie = model, list(prefix), trie
        self.evaluate_prefix()

    def evaluate_prefix(self) -> None:
        """Fill the cache with the prefix, anew."""
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._forward(self._prefix)

    def logits(self, rest: Sequence[int]) -> Any:
        """Logits after the last of `rest`, shape (n_vocab,), float32."""
        row = self._forward(rest)
        self._cache.crop(-len(rest))
        return row

    def score(self, rest: Sequence[int]) -> Scores:
        """Logits at every branch of the trie, and the label mass."""
        row = self._forward(rest)
        first = self._trie.first_tokens
        found = []
        for branch in self._trie.branches:
            if branch.path:
                at = self._forward(branch.path)
                self._cache.crop(-len(branch.path))
            else:
                at = row
            found.append(at[branch.tokens])
        self._cache.crop(-len(rest))
        return Scores(found, label_mass(row, first), label_energy(row, first))

    def _forward(self, tokens: Sequence[int]) -> Any:
        import torch

        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[0, -1].float().numpy().astype(np.float32)
