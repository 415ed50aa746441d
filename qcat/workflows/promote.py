"""Putting a new bundle in the place of one that serves, and keeping the old one.

Beside a bundle DIR stand `DIR.candidate`, the one that may take its place, and `DIR.previous`, the
one whose place it took. Two renames promote: DIR to DIR.previous, DIR.candidate to DIR. A process
killed between them leaves no DIR but both others whole; `reserved` then takes the first rename
back. At every other moment DIR is whole.
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
    """Where the bundle stands that may take this one's place."""
    return bundle.with_name(f"{bundle.name}.candidate")


def previous_of(bundle: Path) -> Path:
    """Where the bundle stands whose place this one took."""
    return bundle.with_name(f"{bundle.name}.previous")


@contextmanager
def reserved(bundle: Path) -> Iterator[bool]:
    """Keep other promotions away; yields whether one that was cut short had to be taken back.

    Raises:
        ExportError: another one is under way; a folder that is no bundle stands where the
            candidate or the previous one should; or nothing can be written there.
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
    """Remove a bundle, if it is there: at once for a reader, by a rename.

    Raises:
        ExportError: what is there is no bundle, or cannot be removed.
    """
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)  # of a process killed just here
    _check_ours(folder)
    if folder.exists():
        _rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def promote(bundle: Path) -> None:
    """Let the candidate take the bundle's place; the bundle becomes the previous one.

    Raises:
        ExportError: a folder cannot be renamed; the bundle is where it was.
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
