"""Replaces the bundle in use by a new one, and keeps the old one.

Beside a bundle DIR there may be `DIR.candidate`, which may replace it, and `DIR.previous`, which it
replaced. A promotion is two renames: DIR to DIR.previous, then DIR.candidate to DIR. If the process
is killed between them, DIR is missing, but the other two are complete; `reserved` then undoes the
first rename. At every other moment DIR is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcat.errors import BundleError, ExportError
from qcat.files import locked
from qcat.gguf.bundle import find_gguf


def candidate_of(bundle: Path) -> Path:
    """Path of the bundle that may replace this one."""
    return bundle.with_name(f"{bundle.name}.candidate")


def previous_of(bundle: Path) -> Path:
    """Path of the bundle that this one replaced."""
    return bundle.with_name(f"{bundle.name}.previous")


@contextmanager
def reserved(bundle: Path) -> Iterator[bool]:
    """Lock out other promotions; yields whether an interrupted promotion had to be undone.

    Raises:
        ExportError: another promotion is running; the candidate's or the previous bundle's path is
            a folder that is not a bundle; or nothing can be written there.
    """
    if bundle.name in ("", ".."):
        raise ExportError(f"{bundle}: cannot be renamed: name the bundle's folder by its own name")
    lock = bundle.with_name(f".{bundle.name}.promote.lock")
    with locked(lock, target=bundle, busy="another retraining is at it", error=ExportError):
        cut_short = not bundle.exists() and previous_of(bundle).is_dir()
        if cut_short:
            _rename(previous_of(bundle), bundle)
        for folder in (candidate_of(bundle), previous_of(bundle)):
            _check_ours(folder)
        yield cut_short


def clear(folder: Path) -> None:
    """Remove a bundle, if it exists. Readers see it vanish at once, by a rename.

    Raises:
        ExportError: the folder is not a bundle, or cannot be removed.
    """
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)  # left by a process that was killed right here
    _check_ours(folder)
    if folder.exists():
        _rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def promote(bundle: Path) -> None:
    """Replace the bundle by the candidate; the bundle becomes the previous one.

    Raises:
        ExportError: a folder cannot be renamed; the bundle is still in its place.
    """
    previous = previous_of(bundle)
    clear(previous)
    _rename(bundle, previous)
    try:
        _rename(candidate_of(bundle), bundle)
    except ExportError:
        _rename(previous, bundle)
        raise


def _check_ours(folder: Path) -> None:
    try:
        if folder.exists():
            find_gguf(folder)
    except BundleError:
        raise ExportError(f"{folder}: is no bundle: move it away") from None


def _rename(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        raise ExportError(
            f"{source}: cannot be renamed to {target.name}: {error.strerror}: mend that and give "
            "the same command again"
        ) from None
