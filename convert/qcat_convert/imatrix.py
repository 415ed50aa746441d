"""The importance matrix: how much each input of each weight matters on the task's own questions.

For each linear layer the mean of its squared inputs over tokens, what llama.cpp's `imatrix` tool
collects; the quantizer then rounds with those weights. Collected from the merged model in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcat.gguf.architecture import Architecture, gguf_name

if TYPE_CHECKING:
    import torch
    from torch import nn

ImportanceMatrix = dict[str, npt.NDArray[np.float32]]


class Importance:
    """Sums of squared inputs, by GGUF tensor name.

    Args:
        arch: how the model's tensors are named.
    """

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def watching(self, module: Any, name: str) -> Iterator[None]:
        """Add the inputs of all linear layers in a module while it is run.

        Args:
            module: a part of the model.
            name: of it, in Hugging Face's tensor names.
        """
        from torch import nn

        def hook(tensor: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            return lambda _, inputs: self.add(tensor, inputs[0])

        handles = [
            part.register_forward_pre_hook(hook(f"{name}.{inner}.weight"))
            for inner, part in module.named_modules()
            if isinstance(part, nn.Linear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, tensor: str, inputs: torch.Tensor) -> None:
        """Add inputs of a tensor, given by its Hugging Face name; shape (…, inputs)."""
        import torch

        name = gguf_name(tensor, self._arch)
        rows = inputs.reshape(-1, inputs.shape[-1])
        sums = rows.square().sum(0, dtype=torch.float64)
        self._sums[name] = self._sums.get(name, 0) + sums
        self._counts[name] = self._counts.get(name, 0) + rows.shape[0]

    def matrix(self) -> ImportanceMatrix:
        """Mean squared input of every linear layer seen, each of shape (inputs,)."""
        return {
            name: (total / self._counts[name]).numpy().astype(np.float32)
            for name, total in self._sums.items()
        }
