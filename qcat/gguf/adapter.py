"""A LoRA adapter in a separate GGUF: its base, and the check of such a file.

One base can then serve many tasks, each in a file of a few megabytes. Like a model file, the
adapter file contains task, calibration and report. It also identifies the base it was trained on.
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
    """Reject an adapter that `qcat export` did not write.

    Raises:
        BundleError: the adapter is rejected; names the file.
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
