"""Hidden states of many questions after one prompt prefix, for training.

Every question of a task has the same prefix, often four times as long as the question. It is
evaluated once per batch and its keys and values are shared, as in the runtime. Gradients flow back
through them, so the adapter is trained on the same function. Needs torch and transformers, which
are imported when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def shared_prefix_states(
    decoder: Any, prefix: Sequence[int], rests: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Last hidden states of `rests`, each computed as if only it followed `prefix`.

    Args:
        decoder: a transformers decoder without its head (`model.model`).
        prefix: token ids, at least one.
        rests: token ids of each row, at least one each.

    Returns:
        (rows, longest rest, hidden); values past the end of a row are meaningless.
    """
    return _begin(decoder, prefix, rests)[0]


def branch_states(
    decoder: Any,
    prefix: Sequence[int],
    rests: Sequence[Sequence[int]],
    paths: Sequence[Sequence[int]],
) -> Iterator[torch.Tensor]:
    """The last hidden state of each row followed by a path, for each path in turn.

    Prefix and rows are evaluated once; for each path only its own tokens are evaluated, as in the
    runtime. For evaluation only: without gradients.

    Args:
        decoder: as for `shared_prefix_states`.
        prefix: as for `shared_prefix_states`.
        rests: as for `shared_prefix_states`.
        paths: token ids; an empty path means the end of the row itself.

    Yields:
        (rows, hidden).
    """
    import torch

    states, cache, mask = _begin(decoder, prefix, rests)
    lengths = torch.tensor([len(rest) for rest in rests], device=states.device)
    rows = torch.arange(len(rests), device=states.device)
    for path in paths:
        if not path:
            yield states[rows, lengths - 1]
            continue
        ids = torch.tensor([list(path)] * len(rests), device=states.device)
        after: torch.Tensor = decoder(
            input_ids=ids,
            attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
            # The gap between a short row's end and its path is masked, and takes no positions.
            position_ids=len(prefix) + lengths[:, None] + torch.arange(len(path)).to(ids),
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        cache.crop(-len(path))
        yield after[:, -1]


def _begin(
    decoder: Any, prefix: Sequence[int], rests: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Hidden states of the rows, the cache after them, and which of its cells hold a token."""
    import torch
    from transformers import DynamicCache

    device = decoder.device
    # A cache that keeps all tokens, also for layers with a window: the masks handle those.
    cache = DynamicCache()
    decoder(input_ids=torch.tensor([list(prefix)], device=device), cache=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rests))
    longest = max(map(len, rests))
    ids = torch.zeros(len(rests), longest, dtype=torch.long)
    mask = torch.zeros(len(rests), len(prefix) + longest, dtype=torch.long)
    for row, rest in enumerate(rests):
        ids[row, : len(rest)] = torch.tensor(rest)
        mask[row, : len(prefix) + len(rest)] = 1
    mask = mask.to(device)
    states: torch.Tensor = decoder(
        input_ids=ids.to(device), attention_mask=mask, cache=cache, use_cache=True
    ).last_hidden_state
    return states, cache, mask
