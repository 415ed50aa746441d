"""Reads a GGUF's header and checks it against the file before llama.cpp reads it.

llama.cpp aborts the process on some damaged files, so the header is checked here first: every
length against the available bytes, every tensor's extent against the file's size. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qcat import cache
from qcat.errors import BundleError
from qcat.files import check_pulled

TOKENS = "tokenizer.ggml.tokens"
"""Key of the vocabulary."""
SCORES, TYPES = "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
BOOLEAN, STRING = 7, 8
"""GGUF's numbers for a truth value and a text."""
_MAGIC = b"GGUF"
_ARRAY = 9
# GGUF value types to struct formats: u8 i8 u16 i16 u32 i32 f32 bool, then u64 i64 f64
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_SIZES = {kind: struct.calcsize(code) for kind, code in _SCALARS.items()}

# ggml tensor types: number to name, elements a block, bytes a block (ggml/src/ggml.c)
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
_ITEMS = {SCORES: struct.pack("<I", 6), TYPES: struct.pack("<I", 5)}  # f32 and i32
_MAX_DIMENSIONS = 4
_LARGE = 1 << 20  # bytes of a header that takes long to read


class Length(int):
    """Stands for an array: only its number of items is kept."""


class Tensor(NamedTuple):
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Row length first, as GGUF stores it."""
    type: str
    offset: int
    """Bytes from the start of the tensor data."""


@dataclass(frozen=True)
class Header:
    """A GGUF header that has been checked against the file it came from."""

    metadata: Mapping[str, Any]
    """Scalars and strings by key; of an array its `Length` only."""
    tensors: tuple[Tensor, ...]
    metadata_end: int
    """Bytes up to the end of the last metadata pair."""
    table_end: int
    """Bytes up to the end of the tensor table."""
    data_start: int
    """Bytes up to the tensor data."""
    n_metadata: int
    distinct_tokens: int
    """Different tokens in the vocabulary."""
    digest: str
    """SHA-256 of the bytes up to the end of the tensor table, in hexadecimal."""


def read_header(path: Path, *, remember: bool = False) -> Header:
    """Read and check the header of any GGUF.

    Args:
        path: of the file.
        remember: keep a large header in the user's cache folder for later use. Only for a file that
            is opened repeatedly, because the cache has room for only a few.

    Raises:
        BundleError: the file is absent, not a GGUF, or damaged; the message names it.
    """
    try:
        status = os.stat(path)
        size = status.st_size
        if path.is_dir():
            raise BundleError(f"{path}: is a folder: name the .gguf file in it")
        if size < len(_MAGIC):
            raise BundleError(f"{path}: not a GGUF file ({size} bytes)")
        check_pulled(path, error=BundleError)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Reading 150,000 tokens in Python takes a tenth of a second at each start.
            place = os.fsencode(os.path.realpath(path))
            key = b"header 2 %s %d %d" % (place, size, status.st_mtime_ns)
            header = _recall(cache.load(key), data)
            if header is None:
                header = _parse(data, size)
                if remember and header.table_end >= _LARGE:
                    cache.save(key, _remember(header))
            return header
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise BundleError(f"{str(path)!r}: no file can have this name") from None
    except (struct.error, IndexError, DamagedError) as error:
        raise BundleError(f"{path}: damaged or cut short ({error}): copy or export again") from None


def _remember(header: Header) -> bytes:
    """A header as JSON. If its form changes, increase the number in `read_header`'s key."""
    metadata = {
        key: [value] if isinstance(value, Length) else value
        for key, value in header.metadata.items()
    }
    return json.dumps(vars(header) | {"metadata": metadata}).encode()


def _recall(saved: memoryview | None, data: mmap.mmap) -> Header | None:
    """The header stored by `_remember`, if the file still begins with the same bytes."""
    if saved is None:
        return None
    try:
        fields = json.loads(bytes(saved))
        if _digest(data, fields["table_end"]) != fields["digest"]:
            return None
        metadata = {
            key: Length(value[0]) if isinstance(value, list) else value
            for key, value in dict(fields["metadata"]).items()
        }
        tensors = (Tensor(name, tuple(shape), *rest) for name, shape, *rest in fields["tensors"])
        return Header(**fields | {"metadata": metadata, "tensors": tuple(tensors)})
    except (ValueError, LookupError, TypeError):  # another qcat wrote it
        return None


def _digest(data: mmap.mmap, end: int) -> str:
    return hashlib.sha256(memoryview(data)[:end]).hexdigest()


class DamagedError(Exception):
    """What is wrong with the bytes; `read_header` adds the file's name."""


class Cursor:
    """Reads little-endian values from bytes and never reads beyond them."""

    def __init__(self, data: bytes | mmap.mmap, size: int, at: int = 0) -> None:
        self.data, self.size, self.at = data, size, at

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise DamagedError(f"{count} bytes expected at byte {self.at} of {self.size}")
        self.at += count

    def take(self, code: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(code))
        return struct.unpack_from(code, self.data, start)[0]

    def string(self) -> bytes:
        length = self.take("<Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def text(self) -> str:
        start = self.at
        try:
            return self.string().decode()
        except UnicodeDecodeError:
            raise DamagedError(f"text expected at byte {start}") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind != _ARRAY:
            raise DamagedError(f"unknown value type {kind} at byte {self.at}")
        item, count = self.take("<I"), self.take("<Q")
        if item == STRING:
            self._skip_strings(count)
        elif item in _SIZES:
            self.skip(_SIZES[item] * count)
        else:
            raise DamagedError(f"unknown array type {item} at byte {self.at}")
        return Length(count)

    def _skip_strings(self, count: int) -> None:
        # A vocabulary has 300,000 of them: this loop takes most of the time.
        if 8 * count > self.size - self.at:
            raise DamagedError(f"{count} strings expected at byte {self.at} of {self.size}")
        at, last, data, unpack = self.at, self.size - 8, self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                raise DamagedError(f"a string expected at byte {at} of {self.size}")
            at += 8 + unpack(data, at)[0]
        if at > self.size:
            raise DamagedError(f"a string runs past the end, byte {self.size}")
        self.at = at


def _parse(data: mmap.mmap, size: int) -> Header:
    cursor = Cursor(data, size)
    if data[:4] != _MAGIC:
        raise DamagedError("does not begin with GGUF")
    cursor.skip(4)
    version = cursor.take("<I")
    if version not in (2, 3):
        raise DamagedError(f"GGUF version {version}, 2 or 3 expected")
    n_tensors, n_metadata = cursor.take("<Q"), cursor.take("<Q")
    metadata: dict[str, Any] = {}
    distinct = 0
    for _ in range(n_metadata):
        key, kind = cursor.text(), cursor.take("<I")
        start = cursor.at
        value = cursor.value(kind)
        if key == TOKENS and kind == _ARRAY:
            if data[start : start + 4] != struct.pack("<I", STRING):
                raise DamagedError("the vocabulary is no list of texts")
            distinct = _count_distinct(data, start + 12, value)
        if key in _ITEMS and (kind != _ARRAY or data[start : start + 4] != _ITEMS[key]):
            raise DamagedError(f"metadata {key} is not a list of the right kind")
        metadata[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    metadata_end = cursor.at
    tensors = tuple(_tensor(cursor) for _ in range(n_tensors))
    alignment = alignment_of(metadata)
    data_start = cursor.at + -cursor.at % alignment
    for tensor in tensors:
        end = data_start + tensor.offset + _bytes(tensor)
        if tensor.offset % alignment or end > size:
            raise DamagedError(f"tensor {shown(tensor.name)} ends at byte {end} of {size}")
    if not tensors:
        raise DamagedError("no tensors")
    return Header(
        metadata=metadata,
        tensors=tensors,
        metadata_end=metadata_end,
        table_end=cursor.at,
        data_start=data_start,
        n_metadata=n_metadata,
        distinct_tokens=distinct,
        digest=_digest(data, cursor.at),
    )


def _count_distinct(data: mmap.mmap, at: int, count: int) -> int:
    """Different strings, not empty and without a NUL, of `count` that begin at a byte."""
    unpack = struct.Struct("<Q").unpack_from
    seen = set()
    for _ in range(count):
        end = at + 8 + unpack(data, at)[0]
        seen.add(data[at + 8 : end])
        at = end
    # llama.cpp gives an empty one a name of its own, which another may have, and aborts.
    return len(seen - {b""}) - (b"".join(seen).count(b"\0") > 0)


def _tensor(cursor: Cursor) -> Tensor:
    name, n_dims = cursor.text(), cursor.take("<I")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise DamagedError(f"tensor {shown(name)} has {n_dims} dimensions")
    shape = tuple(cursor.take("<Q") for _ in range(n_dims))
    kind, offset = cursor.take("<I"), cursor.take("<Q")
    if kind not in TENSOR_TYPES:
        raise DamagedError(f"tensor {shown(name)} has type {kind}, which qcat does not know")
    type_name, block, _ = TENSOR_TYPES[kind]
    if shape[0] % block or 0 in shape:
        raise DamagedError(f"tensor {shown(name)} has the impossible shape {shape}")
    return Tensor(name, shape, type_name, offset)


def _bytes(tensor: Tensor) -> int:
    _, block, size = next(kind for kind in TENSOR_TYPES.values() if kind[0] == tensor.type)
    return math.prod(tensor.shape) // block * size


def alignment_of(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 32 or alignment & (alignment - 1):
        raise DamagedError(f"alignment {shown(alignment)}")
    return alignment


def shown(value: object) -> str:
    """A value from a file, formatted for one line of a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
