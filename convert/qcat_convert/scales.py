"""Applies an adapter of block scales (`qcat train --method scales`) to its base.

The codes are derived from the base's weights and the scales before training. Together with the
scales after training they are the content of a Q4_0 file. Norms and biases, and the embedding if it
was trained, are stored in full. An embedding that was only rounded has the same scales twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcat.errors import ExportError
from qcat.gguf import q4_0
from qcat_convert.peft_adapter import opened_weights
from qcat_convert.weights import Rows

if TYPE_CHECKING:
    import torch

_FIRST, _LAST = ".first_scales", ".scales"
_ROWS, _ALIKE = 8, 0.9  # rows looked at, and how many scales have to be the very same


@dataclass(frozen=True)
class Blocks:
    """A matrix in Q4_0; its slices are rows in float32, so that `Rows` can be read from it."""

    codes: torch.Tensor
    """int8, shape (rows, columns / 32, 32)."""
    scales: torch.Tensor
    """float32, exact in float16, shape (rows, columns / 32)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], self.codes.shape[1] * q4_0.BLOCK

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return q4_0.decode(self.codes[rows], self.scales[rows])

    def take(self, rows: Sequence[int]) -> Blocks:
        """Some rows."""
        return Blocks(self.codes[list(rows)], self.scales[list(rows)])


class ScalesAdapter:
    """The tensors of an adapter of scales.

    Args:
        folder: of the adapter.

    Raises:
        ExportError: its file is absent or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with opened_weights(folder, "pt") as file:
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.blocks: dict[str, Blocks] = {}
        """Of the matrices of the modules that it was last applied to, by tensor name."""

    @property
    def matrices(self) -> set[str]:
        """Names of the tensors that it gives as `Blocks`."""
        ends = (name.removesuffix(_LAST) for name in self._tensors if name.endswith(_LAST))
        return {f"{name}.weight" for name in ends}

    def check(self, model: Any) -> None:
        """Check that a model has a place for every tensor of the adapter.

        Raises:
            ExportError: it does not, or a scale has no partner.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        for name, tensor in self._tensors.items():
            found: tuple[int, ...] | None = tuple(tensor.shape)
            if name.endswith((_FIRST, _LAST)):
                matrix = name.removesuffix(_FIRST).removesuffix(_LAST)
                whole = shapes.get(f"{matrix}.weight", (0, 0))
                wanted: tuple[int, ...] | None = (whole[0], whole[1] // q4_0.BLOCK)
                partners = {f"{matrix}{_FIRST}", f"{matrix}{_LAST}"}
                found = found if partners <= self._tensors.keys() else None
            else:
                wanted = shapes.get(name)
            if found != wanted:
                raise self._misfit(f"tensor {name} has no place in it")

    def apply(self, module: Any, prefix: str) -> None:
        """Replace the numbers of a module's tensors; `blocks` then holds its matrices.

        Args:
            module: a part of the model, with the base's numbers.
            prefix: of its tensors' names, such as `model.layers.0`.

        Raises:
            ExportError: the scales are not of these weights.
        """
        from torch import nn

        self.blocks = {}
        for name, part in module.named_modules():
            path = f"{prefix}.{name}" if name else prefix
            weight = getattr(part, "weight", None)
            if weight is not None and weight.ndim == 2:
                blocks = self.rounded(f"{path}.weight", Rows(weight, len(weight)))
                if blocks:
                    part.weight = nn.Parameter(blocks[:], requires_grad=False)
                    self.blocks[f"{path}.weight"] = blocks
            for key, _ in part.named_parameters(recurse=False):
                if (whole := self.whole(f"{path}.{key}")) is not None:
                    setattr(part, key, whole)

    def rounded(self, name: str, weight: Rows) -> Blocks | None:
        """A matrix of the base in blocks; None if the adapter has none of them.

        Args:
            name: of the matrix.
            weight: as the base has it.

        Raises:
            ExportError: the scales are not of these weights.
        """
        import torch

        path = name.removesuffix(".weight")
        if f"{path}{_LAST}" not in self._tensors:
            return None
        first, last = (self._tensors[f"{path}{end}"].float() for end in (_FIRST, _LAST))
        codes, start = [], 0
        for chunk in weight.chunks():
            part = first[start : start + len(chunk)]
            if not start:
                # Some rows are enough to detect another base: nearly all of its scales differ.
                fitted = q4_0.fit_scales(chunk[:_ROWS])
                if not (fitted == part[:_ROWS]).float().mean() > _ALIKE:
                    raise self._misfit(f"its scales are not of the weights of {path}")
            codes.append(q4_0.encode(chunk, part))
            start += len(chunk)
        return Blocks(torch.cat(codes), last)

    def whole(self, name: str) -> torch.nn.Parameter | None:
        """A tensor that the adapter stores in full; None if it does not."""
        from torch import nn

        tensor = self._tensors.get(name)
        return None if tensor is None else nn.Parameter(tensor.float(), requires_grad=False)

    def _misfit(self, why: str) -> ExportError:
        return ExportError(
            f"adapter {self._folder}: does not fit the base: {why}: name the base that it was "
            "trained on with --base"
        )
