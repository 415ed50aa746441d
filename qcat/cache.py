"""Files in the user's cache folder that save work later. If one is lost, the work is repeated.

Nothing here raises an error: a file that is missing, damaged or owned by another user is treated as
absent, and a file that cannot be written is not kept. Several processes may use the folder at once.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

from qcat.version import __version__

MAX_ENTRIES = 32
MAX_BYTES = 256 << 20
"""Limit for all entries together: the least recently used are removed first."""
_MAGIC = b"qcat cache 1\n"
_START = len(_MAGIC) + hashlib.sha256().digest_size  # bytes of a file before its content
MAX_CONTENT = MAX_BYTES - _START
"""Limit for one entry: a larger one is not kept."""
_SUFFIX = ".qcat"


def folder() -> Path:
    """Where entries are kept: $QCAT_CACHE, or the user's cache folder."""
    if named := os.environ.get("QCAT_CACHE"):
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("qcat")


def load(key: bytes) -> memoryview | None:
    """The content saved under a key, if it exists, is intact and is this user's. Writable."""
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        path = _path(key)
        status = os.lstat(path)
        mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        if not (mine and S_ISREG(status.st_mode) and status.st_size - _START <= MAX_CONTENT):
            return None
        data = bytearray(status.st_size)  # the only copy: a large prompt's is as large as a model
        with path.open("rb", buffering=0) as file:
            whole = file.readinto(data) == len(data)
        content = memoryview(data)[_START:]
        if whole and data[:_START] == _MAGIC + hashlib.sha256(content).digest():
            with suppress(OSError):
                os.utime(path)  # mark it as just used
            return content
    return None


def save(key: bytes, content: bytes | memoryview) -> None:
    """Save bytes under a key atomically, if possible."""
    import tempfile

    if len(content) > MAX_CONTENT:
        return
    with suppress(OSError, RuntimeError):
        path = _path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=_SUFFIX, dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(content).digest())
                file.write(content)
            os.replace(partial, path)
        except OSError:
            os.unlink(partial)
        _trim(path.parent)


def _path(key: bytes) -> Path:
    # Another version of qcat may store something else under the same key.
    name = hashlib.sha256(__version__.encode() + b"\n" + key).hexdigest()
    return folder() / f"{name}{_SUFFIX}"


def _trim(place: Path) -> None:
    """Remove leftovers of killed processes, then the least recently used until the rest fits."""
    found = []
    for path in place.glob(f"*{_SUFFIX}"):
        with suppress(OSError):  # another process may have removed it
            status = path.lstat()
            found.append((status.st_mtime, status.st_size, path))
    found.sort(reverse=True)
    size = 0
    for number, (_, bytes_, path) in enumerate(found):
        size += bytes_
        if number >= MAX_ENTRIES or size > MAX_BYTES:
            with suppress(OSError):
                path.unlink()
