"""Hidden states of many questions after one prompt prefix, for training.

Every question of a task has the same prefix, often four times as long as the question. It is
evaluated once a batch and its keys and values are shared, as the runtime does it; gradients flow
back through them, so the adapter is trained on the very same function. Needs torch and
transformers, imported when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def shared_prefix_states(
    decoder: Any, prefix: Sequence[int], rests: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Last hidden states of `rests`, each as if it alone stood after `prefix`.

    Args:
        decoder: a transformers decoder without its head (`model.model`).
        prefix: token ids, at least one.
        rests: token ids of each row, at least one each.

    Returns:
        (rows, longest rest, hidden); what lies past the end of a row means nothing.
    """
    import torch
    from transformers import DynamicCache

    device = decoder.device
    cache = DynamicCache(config=decoder.config)
    decoder(input_ids=torch.tensor([list(prefix)], device=device), cache=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rests))
    longest = max(map(len, rests))
    ids = torch.zeros(len(rests), longest, dtype=torch.long)
    mask = torch.zeros(len(rests), len(prefix) + longest, dtype=torch.long)
    for row, rest in enumerate(rests):
        ids[row, : len(rest)] = torch.tensor(rest)
        mask[row, : len(prefix) + len(rest)] = 1
    states: torch.Tensor = decoder(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        cache=cache,
        use_cache=True,
    ).last_hidden_state
    return states


def last_states(states: torch.Tensor, rests: Sequence[Sequence[int]]) -> torch.Tensor:
    """The state at the last token of each row: (rows, hidden)."""
    rows = list(range(len(rests)))
    return states[rows, [len(rest) - 1 for rest in rests]]
