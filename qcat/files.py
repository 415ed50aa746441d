"""Files and folders that appear whole or not at all, and locks between processes."""

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
"""Flags of `os.open`: other programs do not inherit the file (where there is no such flag Python
sees to that), and bytes go in and out as they are, which Windows does not do unasked."""
_LOCKED_BYTE = 0x7FFF_FFF0
"""Which byte of a file stands for all, where a lock has to be of one: nobody can read it meanwhile,
so it lies far behind the end of any journal."""


def lock_open_file(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if another process has the lock.

    Raises:
        OSError: its disk knows no locks.
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
    except (BlockingIOError, PermissionError):  # the second is what Windows says
        return False
    return True


@contextmanager
def whole_file(path: Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file to write, under another name beside `path`, which it takes when the block has ended.

    A reader sees the old file or the new one, never half of it, also after a crash of the machine.

    Args:
        path: of the file.
        mode: its permissions; None for what the system gives a new file.

    Raises:
        OSError: the file cannot be written.
        ValueError: no file can have that name.
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
        DataError: the file cannot be written, or no file can have that name.
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
    """Keep other processes away from a target; the system frees the lock when the process dies.

    Args:
        lock: file of the lock; removed in the end.
        target: what is locked, for messages.
        busy: what another process is doing that has it.
        error: what to raise.
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
        except OSError:  # Windows deletes no file that is open, here or meanwhile elsewhere
            held.release()
            with suppress(OSError):
                lock.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, purpose: str, error: type[QcatError]) -> Iterator[Path]:
    """A temporary folder beside the target, which it becomes when the block has ended.

    What killed processes left behind is removed first. A lock keeps two of them apart.

    Args:
        target: the folder to make.
        purpose: one word, for the names of the temporary folder and the lock.
        error: what to raise where the target cannot be written, or the disk is full.
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
    """See before long work that a file can be written after it. Raises QcatError if not."""
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
        error: what to raise: the file cannot be read, or holds something else.
        advice: what to do where it cannot be read.
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
    """See that a file is not what Git LFS leaves in its place.

    Args:
        path: of the file.
        error: what to raise if it is a pointer. A file that cannot be read is none.
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise error(f"{path}: {IS_POINTER}")
