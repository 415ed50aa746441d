"""Files and folders that appear complete or not at all, and locks between processes."""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qcat.charset import HEAD, IS_POINTER, POINTER, foreign
from qcat.errors import DataError, QcatError

PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags of `os.open`: other programs do not inherit the file (without such a flag, Python ensures
this), and bytes are not translated, which Windows would do by default."""
_LOCKED_BYTE = 0x7FFF_FFF0
"""The byte to lock in place of the whole file, where locks apply to bytes: nobody can read a locked
byte, so it is far beyond the end of any journal."""


def lock_open_file(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if another process has the lock.

    Raises:
        OSError: its disk does not support locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            at = os.lseek(descriptor, 0, os.SEEK_CUR)
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, at, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second is Windows' error
        return False
    return True


@contextmanager
def whole_file(path: Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file to write under a temporary name beside `path`; renamed when the block ends.

    A reader sees the old file or the new one, never a partial one, even after a machine crash.

    Args:
        path: path of the file.
        mode: its permissions; None for the system's default.

    Raises:
        OSError: the file cannot be written.
        ValueError: the name is not valid for a file.
    """
    part = path.with_name(f".qcat-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            part.chmod(mode)
        part.replace(path)
    finally:
        with suppress(OSError, ValueError):
            part.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as `whole_file` does.

    Raises:
        DataError: the file cannot be written, or the name is not valid for a file.
    """
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}: choose another") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise DataError(f"{str(path)!r}: no file can have this name: choose another") from None


@contextmanager
def locked(lock: Path, *, target: Path, busy: str, error: type[QcatError]) -> Iterator[None]:
    """Lock out other processes from a target; the system frees the lock if the process dies.

    Args:
        lock: the lock file; removed at the end.
        target: what is locked, for messages.
        busy: what another process that has the lock is doing, for messages.
        error: error to raise.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock, blocking=False)
    try:
        held.acquire()
    except Timeout:
        raise error(f"{target}: {busy}: wait for it") from None
    except OSError as reason:
        raise error(f"{target}: {reason.strerror or reason}: choose another folder") from None
    try:
        yield
    finally:
        try:
            lock.unlink(missing_ok=True)
            held.release()
        except OSError:  # Windows does not delete a file that is open here or elsewhere
            held.release()
            with suppress(OSError):
                lock.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, purpose: str, error: type[QcatError]) -> Iterator[Path]:
    """A temporary folder beside the target, renamed to it when the block ends.

    Leftovers of killed processes are removed first. A lock excludes concurrent writers.

    Args:
        target: the folder to make.
        purpose: one word, for the names of the temporary folder and the lock.
        error: error to raise if the target cannot be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        parent = target.parent.resolve()
    except OSError as reason:
        raise error(f"{target}: {reason.strerror or reason}: choose another folder") from None
    lock = parent / f".{target.name}.{purpose}.lock"
    with locked(lock, target=target, busy=f"another {purpose} is writing it", error=error):
        prefix = f".{target.name}.{purpose}-"
        folder = None
        try:
            for stale in parent.glob(f"{glob.escape(prefix)}????????"):
                shutil.rmtree(stale, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            folder.chmod(0o755)
            yield folder
            _rename(folder, target, error)
        except OSError as reason:
            if reason.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise error(f"{target}: the disk is full: make room") from None
        finally:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, target: Path, error: type[QcatError]) -> None:
    try:
        folder.rename(target)
    except OSError as reason:
        raise error(f"{target}: cannot be put in place: {reason.strerror}") from None


def check_writable(path: Path) -> None:
    """Check before long work that a file can be written after it. Raises QcatError if not."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise QcatError(f"{path}: is a folder: name a file")
    except OSError as error:
        raise QcatError(f"{path}: cannot be written: {error.strerror}: choose another") from None


def read_json(path: Path, *, error: type[QcatError], advice: str) -> dict[str, Any]:
    """The JSON object in a file that another program wrote.

    Args:
        path: of the file.
        error: error to raise if the file cannot be read or holds something else.
        advice: what to do if it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as found:
        raise error(f"{path}: {found.strerror}: {advice}") from None
    if what := foreign(data[:HEAD]):
        raise error(f"{path}: {what}")
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{path}: begins with a byte order mark: save it as UTF-8 without one")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as found:
        raise error(f"{path}: not JSON: {found}") from None
    if not isinstance(fields, dict):
        raise error(f"{path}: a JSON object expected")
    return fields


def check_pulled(path: Path, *, error: type[QcatError]) -> None:
    """Check that a file is not a Git LFS pointer.

    Args:
        path: of the file.
        error: error to raise if it is one. An unreadable file does not count as a pointer.
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise error(f"{path}: {IS_POINTER}")
