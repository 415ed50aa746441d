"""The importance matrix: how much each input of each weight matters on the task's own questions.

For each linear layer the mean of its squared inputs over tokens, what llama.cpp's `imatrix` tool
collects; the quantizer then rounds with those weights. Computed on the merged model in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from convert.replay import TorchReplay
from convert.tensors import EMBEDDING, HEAD, architecture, gguf_name, is_tied

if TYPE_CHECKING:
    import torch

ImportanceMatrix = dict[str, npt.NDArray[np.float32]]


def importance_matrix(
    replay: TorchReplay,
    rests: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportanceMatrix:
    """Mean squared input of every linear layer, by GGUF tensor name, each of shape (inputs,).

    The prefix counts once, each question's own tokens once: what the runtime evaluates.

    Args:
        replay: the merged model with the task's prefix.
        rests: token ids after the prefix, one sequence a question.
        progress: called with questions done and in all.
    """
    from torch import nn

    arch = architecture(replay.model.config)
    head = EMBEDDING if is_tied(replay.model.state_dict()) else HEAD
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def collect(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + (rows * rows).sum(0)
            counts[name] = counts.get(name, 0) + rows.shape[0]

        return collect

    handles = [
        module.register_forward_pre_hook(
            hook(gguf_name(head if name == "lm_head" else f"{name}.weight", arch))
        )
        for name, module in replay.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        replay.evaluate_prefix()
        for done, rest in enumerate(rests, 1):
            replay.logits(rest)
            progress(done, len(rests))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[name] / counts[name]).numpy().astype(np.float32) for name in sums}
