"""What qcat keeps in a GGUF's metadata: JSON objects under keys of its own."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcat.errors import BundleError
from qcat.files import whole_file
from qcat.gguf.header import BOOLEAN, STRING, Cursor, Header, alignment_of, read_header

TASK_KEY = "qcat.task"
SOURCE_KEY = "qcat.source"
REPORT_KEY = "qcat.report"
CALIBRATION_KEY = "qcat.calibration"
REFERENCE_KEY = "qcat.reference"
_COPIED = 1 << 22  # bytes at once


def section(header: Header, key: str, path: Path) -> dict[str, Any]:
    """A JSON object kept under a metadata key; empty if the key is absent.

    Raises:
        BundleError: if what is there is not a JSON object.
    """
    try:
        data = json.loads(header.metadata.get(key, "{}"))
        json.dumps(data, ensure_ascii=False).encode()  # fails on what cannot be printed either
    except (ValueError, TypeError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise BundleError(f"{path}: metadata {key} is not a JSON object: export it again")
    return data


def write_sections(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Add or replace JSON objects in a GGUF's metadata; the tensor data are copied as they are.

    The new file replaces the old one atomically, so a reader sees one of the two, complete.

    Args:
        path: of the file.
        sections: the objects by their metadata keys.

    Raises:
        BundleError: the file cannot be read, or not written.
    """
    write_metadata(
        path,
        {
            key: json.dumps(data, ensure_ascii=False, allow_nan=False)
            for key, data in sections.items()
        },
    )


def write_metadata(path: Path, pairs: Mapping[str, str | bool]) -> None:
    """Add or replace texts and booleans in a GGUF's metadata, as `write_sections` does objects."""
    _rewrite(path, path, {key: _packed_value(value) for key, value in pairs.items()})


def copy_without(path: Path, target: Path, key: str) -> None:
    """Copy a GGUF less one pair of its metadata. Raises BundleError as `write_sections` does."""
    _rewrite(path, target, {key: None})


def _rewrite(path: Path, to: Path, values: Mapping[str, bytes | None]) -> None:
    """Write a GGUF with other values (packed) under some keys, or without them, in one step."""
    header = read_header(path)
    try:
        mode = path.stat().st_mode & 0o777
        # The source is closed before it is replaced, which Windows requires.
        with whole_file(to, mode=mode) as target, path.open("rb") as source:
            start = source.read(8)
            source.seek(8 + 16)
            pairs = source.read(header.metadata_end - 24)
            count = header.n_metadata
            for key, value in values.items():
                left = _without(pairs, key)
                count += (value is not None) - (len(left) < len(pairs))
                pairs = left
                if value is not None:
                    pairs += _packed_string(key.encode()) + value
            target.write(start + struct.pack("<QQ", len(header.tensors), count))
            target.write(pairs)
            target.write(source.read(header.table_end - header.metadata_end))
            alignment = alignment_of(header.metadata)
            target.write(b"\0" * (-target.tell() % alignment))
            source.seek(header.data_start)
            shutil.copyfileobj(source, target, _COPIED)
    except OSError as error:
        raise BundleError(f"{to}: cannot be written: {error.strerror}: make room") from None


def _packed_value(value: str | bool) -> bytes:
    """A value with its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOLEAN, value)
    return struct.pack("<I", STRING) + _packed_string(value.encode())


def _packed_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _without(pairs: bytes, key: str) -> bytes:
    """The metadata pairs less the one under `key`."""
    cursor = Cursor(pairs, len(pairs))
    while cursor.at < len(pairs):
        start = cursor.at
        found, kind = cursor.text(), cursor.take("<I")
        cursor.value(kind)
        if found == key:
            return pairs[:start] + pairs[cursor.at :]
    return pairs
