"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from qcat.errors import DataError


def write_whole(path: Path, data: bytes) -> None:
    """Write under another name beside the file, then rename: a reader never sees half of it.

    Raises:
        DataError: the file cannot be written, or no file can have that name.
    """
    part = path.with_name(f".qcat-{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}: choose another") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise DataError(f"{str(path)!r}: no file can have this name: choose another") from None
    finally:
        with suppress(OSError, ValueError):
            part.unlink()
