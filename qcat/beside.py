"""A LoRA adapter in a GGUF of its own, and the base that it lies beside.

One base then serves many tasks, each a file of some megabytes. The adapter's file carries task,
calibration and report as a whole model's does, and says which base it was trained on: with other
weights under it, it would answer nonsense.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcat.bundle import Bundle, Header, Tensor, check_model, fingerprint, read_header, section
from qcat.errors import BundleError

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


def find_base(bundle: Bundle, named: Path | None) -> tuple[Path, Header]:
    """The base of an adapter and its header, checked: the very one, and llama.cpp may see it.

    Args:
        bundle: the adapter.
        named: where the base is; None looks where it was at export.

    Raises:
        BundleError: it is not there, or is another one.
    """
    from qcat.errors import ModelError
    from qcat.gguf_base import gguf_file

    data = section(bundle.header, BASE_KEY, bundle.path)
    try:
        base = BaseFile(str(data["path"]), str(data["identity"]))
    except KeyError:
        raise BundleError(f"{bundle.path}: names no base: export it again") from None
    try:
        path = named or gguf_file(base.path)
        header = read_header(path, remember=True)
    except (BundleError, ModelError) as error:
        raise BundleError(
            f"{bundle.path}: is an adapter, and its base is not to be had ({error}): name the base "
            "as the model, and this file as its adapter"
        ) from None
    if fingerprint(path, header, anywhere=True) != base.identity:
        raise BundleError(
            f"{path}: is not the base that {bundle.path} was trained on, which was {base.path}"
        )
    check_model(path, header)
    return path, header


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
