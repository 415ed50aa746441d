"""The training loss and the validation scores, both computed from hidden states after a prefix.

`answer`: the usual language-model loss, over the whole vocabulary, of the label's tokens and the
end token. `labels`: the negative log of P(label | question) as the runtime computes it: a softmax
over the children at each branching node of the label trie, and nothing else of the vocabulary
(as in classification by label-token logits). It does not teach the model to write a label or to
stop after it, so a model trained on it needs a grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qcat.encoding.scoring import Floats, label_log_probabilities
from qcat.encoding.trie import LabelTrie
from qcat.training.forward import branch_states, shared_prefix_states

if TYPE_CHECKING:
    import torch

Objective = Literal["labels", "answer"]


@dataclass(frozen=True)
class Encoded:
    """A question as tokens, and its label."""

    rest: tuple[int, ...]
    """Token ids after the prefix, up to the answer."""
    label: int


class Scorer:
    """A causal language model with a task's prefix, in torch.

    Args:
        model: a transformers causal language model; LoRA layers may have been put into it.
        prefix: token ids of the prompt up to the question.
        trie: the label language.
    """

    def __init__(self, model: Any, prefix: Sequence[int], trie: LabelTrie) -> None:
        self._decoder, self._head = model.model, model.lm_head
        self._prefix, self._trie = list(prefix), trie
        # For each label the branches on its path: depth, branch, the child to follow.
        self._ways = [_way(trie, sequence) for sequence in trie.sequences]

    def loss(self, batch: Sequence[Encoded], objective: Objective) -> torch.Tensor:
        """Mean loss of a batch: a scalar with gradients, in nats per question."""
        return self._label_loss(batch) if objective == "labels" else self._answer_loss(batch)

    def _label_loss(self, batch: Sequence[Encoded]) -> torch.Tensor:
        import torch
        from torch.nn import functional

        rows, places = [], []
        for number, item in enumerate(batch):
            way = self._ways[item.label]
            answer = self._trie.sequences[item.label]
            deepest = way[-1][0] if way else 0
            rows.append([*item.rest, *answer[:deepest]])
            places += [(b, number, len(item.rest) + depth - 1, child) for depth, b, child in way]
        states = shared_prefix_states(self._decoder, self._prefix, rows)
        total = states.new_zeros((), dtype=torch.float32)
        for branch in sorted({place[0] for place in places}):
            _, numbers, ends, children = zip(*(p for p in places if p[0] == branch), strict=True)
            logits = self._logits(states[list(numbers), list(ends)], branch)
            total = total + functional.cross_entropy(
                logits, torch.tensor(children, device=logits.device), reduction="sum"
            )
        return total / len(batch)

    def _answer_loss(self, batch: Sequence[Encoded]) -> torch.Tensor:
        import torch
        from torch.nn import functional

        answers = [self._trie.sequences[item.label] for item in batch]
        rows = [[*item.rest, *answer] for item, answer in zip(batch, answers, strict=True)]
        states = shared_prefix_states(self._decoder, self._prefix, rows)
        numbers, ends, tokens = zip(
            *(
                (number, len(batch[number].rest) + place - 1, token)
                for number, answer in enumerate(answers)
                for place, token in enumerate((*answer, self._trie.end))
            ),
            strict=True,
        )
        logits = _float_product(states[list(numbers), list(ends)], self._head.weight)
        loss: torch.Tensor = functional.cross_entropy(
            logits, torch.tensor(tokens, device=logits.device), reduction="sum"
        )
        return loss / len(batch)

    def log_probabilities(self, rests: Sequence[Sequence[int]]) -> Floats:
        """log P(label | question) in evaluation mode, shape (questions, labels)."""
        import torch

        with torch.inference_mode():
            found: list[list[Any]] = [[] for _ in rests]
            paths = [branch.path for branch in self._trie.branches]
            every = branch_states(self._decoder, self._prefix, rests, paths)
            for number, states in enumerate(every):
                for place, logits in enumerate(self._logits(states, number).cpu().numpy()):
                    found[place].append(logits)
        return np.array([label_log_probabilities(self._trie, logits) for logits in found])

    def _logits(self, states: torch.Tensor, branch: int) -> torch.Tensor:
        """Logits of a branch's tokens, (rows, children), float32."""
        import torch

        tokens = torch.as_tensor(self._trie.branches[branch].tokens.astype(np.int64))
        return _float_product(states, self._head.weight[tokens.to(states.device)])


def _float_product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits in float32, also under autocast, because labels would tie in bfloat16."""
    import torch

    with torch.autocast(states.device.type, enabled=False):
        return states.float() @ weight.float().T


def _way(trie: LabelTrie, sequence: tuple[int, ...]) -> list[tuple[int, int, int]]:
    tokens = (*sequence, trie.end)
    return [
        (len(branch.path), number, branch.tokens.tolist().index(tokens[len(branch.path)]))
        for number, branch in enumerate(trie.branches)
        if branch.path == sequence[: len(branch.path)]
    ]
