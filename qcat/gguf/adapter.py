"""A LoRA adapter in a GGUF of its own: which base it is for, and the check of such a file.

One base then serves many tasks, each a file of some megabytes. The adapter's file carries task,
calibration and report as a whole model's does, and says which base it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcat.errors import BundleError
from qcat.gguf.header import Header, Tensor

BASE_KEY = "qcat.base"
_A, _B = ".lora_a", ".lora_b"
_TYPES = ("F32", "F16", "Q8_0")


@dataclass(frozen=True)
class BaseFile:
    """Which base an adapter is for."""

    path: str
    """Where it lay at export: a path, or `ollama:NAME`."""
    identity: str
    """Its fingerprint, wherever it lies."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the adapter's metadata."""
        return asdict(self)


def check_adapter(path: Path, header: Header) -> None:
    """Refuse an adapter that `qcat export` does not write.

    Raises:
        BundleError: naming the file.
    """
    alpha: Any = header.metadata.get("adapter.lora.alpha")
    pairs: dict[str, dict[str, Tensor]] = {}
    for tensor in header.tensors:
        name, dot, end = tensor.name.rpartition(".")
        pairs.setdefault(name, {})[dot + end] = tensor
    whole = header.metadata.get("adapter.type") == "lora" and isinstance(alpha, float)
    if not (whole and 0 < alpha < math.inf and all(map(_is_pair, pairs.values()))):
        raise BundleError(f"{path}: is no LoRA adapter as qcat writes it: export it again")


def _is_pair(tensors: dict[str, Tensor]) -> bool:
    if tensors.keys() != {_A, _B} or any(t.type not in _TYPES for t in tensors.values()):
        return False
    one, two = tensors[_A].shape, tensors[_B].shape
    return len(one) == len(two) == 2 and one[1] == two[0]
