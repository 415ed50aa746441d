"""Finds the base of an adapter file; with another base, the adapter gives wrong answers."""

from __future__ import annotations

from pathlib import Path

from qcat.base.gguf_base import gguf_file
from qcat.errors import BundleError, ModelError
from qcat.gguf.adapter import BASE_KEY, BaseFile
from qcat.gguf.bundle import Bundle, fingerprint
from qcat.gguf.check import check_model
from qcat.gguf.header import Header, read_header
from qcat.gguf.sections import section


def find_base(bundle: Bundle, named: Path | None) -> tuple[Path, Header]:
    """The base of an adapter and its header, after checking that it is the right, valid file.

    Args:
        bundle: the adapter.
        named: path of the base; None for its path at export.

    Raises:
        BundleError: it does not exist, or is a different base.
    """
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
