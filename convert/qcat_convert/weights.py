"""A checkpoint's tensors where they lie: shapes from the headers, numbers read when needed.

A file is mapped only while something of it is read, so that no more than that is in memory.
Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcat.base.checkpoint import first_line
from qcat.errors import ModelError
from qcat.files import check_pulled

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
_NUMBERS = ("F64", "F32", "F16", "BF16")
_CHUNK = 1 << 22  # numbers converted at once: 16 MB in float32


class Checkpoint:
    """The safetensors files of a base model's folder, one or several with an index.

    Raises:
        ModelError: a file is absent or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        """Of each tensor, by name."""
        self._files: dict[str, Path] = {}
        for path in self._paths():
            with self._opened(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() not in _NUMBERS:
                        raise self._cannot(
                            f"{name} is stored as {part.get_dtype()}: it is quantized: start from "
                            "the unquantized base"
                        )
                    self.shapes[name] = tuple(part.get_shape())
                    self._files[name] = path

    def _paths(self) -> list[Path]:
        whole = self.folder / "model.safetensors"
        if whole.is_file():
            return [whole]
        index = self.folder / "model.safetensors.index.json"
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except FileNotFoundError:
            raise self._cannot(
                f"has neither {whole.name} nor {index.name}: save it with save_pretrained"
            ) from None
        except OSError as error:
            raise self._cannot(f"{index.name}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._cannot(f"{index.name} does not say which file holds what") from None
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise self._cannot(f"{index.name} names files that are not beside it")
        return [self.folder / name for name in sorted(names)]

    def _opened(self, path: Path, framework: str) -> Any:
        from safetensors import SafetensorError, safe_open

        check_pulled(path, error=ModelError)
        try:
            return safe_open(path, framework)
        except (OSError, SafetensorError) as error:
            raise self._cannot(f"{path.name}: {first_line(error)}") from None

    def _cannot(self, why: str) -> ModelError:
        return ModelError(f"base {self.folder}: cannot be loaded: {why}")

    def read(self, name: str) -> torch.Tensor:
        """A tensor in float32, a copy of its own."""
        import torch

        with self._opened(self._files[name], "pt") as file:
            return torch.as_tensor(file.get_tensor(name)).to(torch.float32, copy=True)

    def rows(self, name: str, count: int) -> Rows:
        """A matrix of which rows are read when they are needed; the file stays mapped as long."""
        return Rows(self._opened(self._files[name], "pt").get_slice(name), count)


class Rows:
    """A matrix, in memory or still in its file, that is read in parts.

    Args:
        source: a tensor, or a slice as safetensors' `get_slice` gives it.
        count: rows that the matrix is to have: more than the source has are zeros, as an embedding
            has them for tokens that were added later.
    """

    def __init__(self, source: Any, count: int) -> None:
        self._source = source
        shape = source.get_shape() if hasattr(source, "get_shape") else source.shape
        self._stored = int(shape[0])
        self.shape = (count, int(shape[1]))

    def chunks(self, ids: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """Rows in order, some megabytes at a time, as they are stored.

        Args:
            ids: which rows, ascending; None for all.
        """
        rows, columns = self.shape
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            part = self._part(start, min(start + step, rows))
            if ids is not None:
                wanted = ids[bisect_left(ids, start) : bisect_left(ids, start + step)]
                part = part[[number - start for number in wanted]]
            if len(part):
                yield part

    def take(self, ids: Sequence[int]) -> torch.Tensor:
        """Some rows, in float32: (ids, columns)."""
        import torch

        return torch.cat([self._part(i, i + 1) for i in ids]).to(torch.float32)

    def equals(self, other: Rows) -> bool:
        """Whether both hold the same numbers."""
        return self.shape == other.shape and all(
            one.equal(two) if one.dtype == two.dtype else one.float().equal(two.float())
            for one, two in zip(self.chunks(), other.chunks(), strict=True)
        )

    def _part(self, start: int, stop: int) -> torch.Tensor:
        import torch

        part: torch.Tensor = self._source[start : min(stop, self._stored)]
        missing = stop - max(start, min(stop, self._stored))
        if not missing:
            return part
        zeros = torch.zeros(missing, self.shape[1], dtype=part.dtype)
        return torch.cat([part, zeros]) if start < self._stored else zeros
