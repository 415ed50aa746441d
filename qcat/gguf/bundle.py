"""What a qcat GGUF says of itself, and the check that a file is whole before llama.cpp sees it.

llama.cpp aborts the process on some damaged files, so the header is walked here first: every
length against the bytes that are there, every tensor's extent against the file's size. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
Knows nothing of llama.cpp.
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
from typing import Any, BinaryIO, NamedTuple

from qcat import cache
from qcat.errors import BundleError, TaskError
from qcat.task import Task

TASK_KEY = "qcat.task"
SOURCE_KEY = "qcat.source"
REPORT_KEY = "qcat.report"
CALIBRATION_KEY = "qcat.calibration"
REFERENCE_KEY = "qcat.reference"

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
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
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}  # fmt: skip
_MAX_DIMENSIONS = 4
_LARGE = 1 << 20  # bytes of a header that takes long to walk
_SAMPLES, _SAMPLE = 64, 4096  # places in the tensor data that a fingerprint reads, bytes of each

# What `qcat_convert.writer` writes of a model, with the largest number that makes sense
_ARCHITECTURES = ("qwen3", "qwen2", "llama")
_COUNTS = {
    "block_count": 512,  # llama.cpp's own limit
    "context_length": 1 << 30,
    "embedding_length": 1 << 20,
    "feed_forward_length": 1 << 22,
    "attention.head_count": 1 << 12,
    "attention.head_count_kv": 1 << 12,
    "attention.key_length": 1 << 12,
    "attention.value_length": 1 << 12,
    "rope.dimension_count": 1 << 12,
    "vocab_size": 1 << 24,
}
_RATES = ("rope.freq_base", "attention.layer_norm_rms_epsilon")
_TOKENS = "tokenizer.ggml.tokens"


class Length(int):
    """What is kept of an array: how many items it has."""


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


@dataclass(frozen=True)
class Bundle:
    """A qcat GGUF: the file, its header and the task it carries."""

    path: Path
    header: Header
    task: Task

    @classmethod
    def read(cls, path: str | Path, *, remember: bool = False) -> Bundle:
        """Check a file and read what it says of itself.

        Args:
            path: of the file.
            remember: as in `read_header`.

        Raises:
            BundleError: the file is absent, no GGUF, damaged, or carries no usable qcat task.
        """
        file = Path(path)
        header = read_header(file, remember=remember)
        if TASK_KEY not in header.metadata:
            raise BundleError(f"{file}: a GGUF without qcat metadata: make one with `qcat export`")
        if is_adapter(header):
            from qcat.gguf.adapter import check_adapter

            check_adapter(file, header)
        else:
            check_model(file, header)
        data = section(header, TASK_KEY, file)
        try:
            task = Task.from_dict(data)
            if task.verbalizer == "code" and not task.codes:
                raise TaskError("no codes for the labels")
        except (TaskError, TypeError) as error:
            raise BundleError(f"{file}: metadata {TASK_KEY}: {error}: export it again") from None
        return cls(file, header, task)


def is_adapter(header: Header) -> bool:
    """Whether a file holds an adapter and no model: it takes a base (`qcat.gguf.adapter`)."""
    return header.metadata.get("general.type") == "adapter"


def identity(metadata: Mapping[str, Any]) -> str:
    """A name for the model in a file's or a server's metadata: its task and twelve hex digits.

    They stand for all that qcat says there but the reference for drift, which is no part of how
    the model answers: another training, export or calibration gives another name.
    """
    said = {
        key: value
        for key, value in metadata.items()
        if key.startswith("qcat.") and key != REFERENCE_KEY
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return f"{json.loads(said[TASK_KEY])['name']}-{digest[:12]}"


def fingerprint(path: Path, header: Header, *, anywhere: bool = False) -> str:
    """What tells a file from others, in milliseconds, in hexadecimal.

    SHA-256 over its header, its size and time of last change, and samples of its tensor data.

    Args:
        path: of the file.
        header: its header.
        anywhere: leave the time of last change out, so that a copy has the same.

    Raises:
        BundleError: the file cannot be read any more.
    """
    try:
        status = os.stat(path)
        changed = "" if anywhere else f" {status.st_mtime_ns}"
        digest = hashlib.sha256(f"{header.digest} {status.st_size}{changed}".encode())
        step = max(_SAMPLE, (status.st_size - header.data_start) // _SAMPLES)
        with path.open("rb") as file:
            for at in range(header.data_start, status.st_size, step):
                file.seek(at)
                digest.update(file.read(_SAMPLE))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def find_gguf(folder: Path) -> Path:
    """The GGUF in a bundle. Raises BundleError if there is none, or more than one."""
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if len(found) != 1:
        raise BundleError(
            f"{folder}: {len(found)} GGUF files there: name the folder that `qcat export` made"
        )
    return found[0]


def section(header: Header, key: str, path: Path) -> dict[str, Any]:
    """A JSON object kept under a metadata key; empty if the key is absent.

    Raises:
        BundleError: if what is there is not a JSON object.
    """
    try:
        data = json.loads(header.metadata.get(key, "{}"))
        json.dumps(data, ensure_ascii=False).encode()  # fails on what could not be printed either
    except (ValueError, TypeError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise BundleError(f"{path}: metadata {key} is not a JSON object: export it again")
    return data


def read_header(path: Path, *, remember: bool = False) -> Header:
    """Read and check the header of any GGUF.

    Args:
        path: of the file.
        remember: keep a large one in the user's cache folder for the next time: for a file that
            is to be opened again and again, since there is room for a few only.

    Raises:
        BundleError: the file is absent, no GGUF, or damaged; the message names it.
    """
    try:
        status = os.stat(path)
        size = status.st_size
        if path.is_dir():
            raise BundleError(f"{path}: is a folder: name the .gguf file in it")
        if size < len(_MAGIC):
            raise BundleError(f"{path}: not a GGUF file ({size} bytes)")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # To walk 150,000 tokens in Python takes a tenth of a second, at each start.
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
    except (struct.error, IndexError, _DamagedError) as error:
        raise BundleError(f"{path}: damaged or cut short ({error}): copy or export again") from None


def _remember(header: Header) -> bytes:
    """A header as JSON. Who changes its form counts up the number in `read_header`'s key."""
    metadata = {
        key: [value] if isinstance(value, Length) else value
        for key, value in header.metadata.items()
    }
    return json.dumps(vars(header) | {"metadata": metadata}).encode()


def _recall(saved: memoryview | None, data: mmap.mmap) -> Header | None:
    """The header that `_remember` made, if a file still begins with the same bytes."""
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


def write_sections(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Add or replace JSON objects in a GGUF's metadata; the tensor data are copied as they are.

    The new file replaces the old one at once, so a reader sees one of the two, whole.

    Args:
        path: of the file.
        sections: the objects by their metadata keys.

    Raises:
        BundleError: the file cannot be read, or not written.
    """
    packed = {
        key: json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
        for key, data in sections.items()
    }
    _rewrite(path, path, packed)


def copy_without(path: Path, target: Path, key: str) -> None:
    """Copy a GGUF less one pair of its metadata. Raises BundleError as `write_sections` does."""
    _rewrite(path, target, {key: None})


def _rewrite(path: Path, to: Path, sections: Mapping[str, bytes | None]) -> None:
    """Write a GGUF with other strings under some keys, or without them, in one step."""
    header = read_header(path)
    partial = to.with_name(f"{to.name}.{os.getpid()}.part")
    try:
        with path.open("rb") as source, partial.open("wb") as target:
            source.seek(0)
            start = source.read(8)
            source.seek(8 + 16)
            pairs = source.read(header.metadata_end - 24)
            count = header.n_metadata
            for key, text in sections.items():
                left = _without(pairs, key)
                count += (text is not None) - (len(left) < len(pairs))
                pairs = left
                if text is not None:
                    packed = struct.pack("<I", _STRING) + _packed_string(text)
                    pairs += _packed_string(key.encode()) + packed
            target.write(start + struct.pack("<QQ", len(header.tensors), count))
            target.write(pairs)
            target.write(source.read(header.table_end - header.metadata_end))
            alignment = _alignment(header.metadata)
            target.write(b"\0" * (-target.tell() % alignment))
            source.seek(header.data_start)
            _copy(source, target)
            target.flush()
            os.fsync(target.fileno())
        partial.chmod(path.stat().st_mode & 0o777)
        os.replace(partial, to)
    except OSError as error:
        raise BundleError(f"{to}: cannot be written: {error.strerror}: make room") from None
    finally:
        partial.unlink(missing_ok=True)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while chunk := source.read(1 << 22):
        target.write(chunk)


class _DamagedError(Exception):
    """What is wrong with the bytes; `read_header` adds the file's name."""


class _Cursor:
    """Reads little-endian values from bytes and refuses to leave them."""

    def __init__(self, data: bytes | mmap.mmap, size: int, at: int = 0) -> None:
        self.data, self.size, self.at = data, size, at

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise _DamagedError(f"{count} bytes expected at byte {self.at} of {self.size}")
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
            raise _DamagedError(f"text expected at byte {start}") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind != _ARRAY:
            raise _DamagedError(f"unknown value type {kind} at byte {self.at}")
        item, count = self.take("<I"), self.take("<Q")
        if item == _STRING:
            self._skip_strings(count)
        elif item in _SIZES:
            self.skip(_SIZES[item] * count)
        else:
            raise _DamagedError(f"unknown array type {item} at byte {self.at}")
        return Length(count)

    def _skip_strings(self, count: int) -> None:
        # A vocabulary has 300,000 of them: this loop is what reading a header costs.
        if 8 * count > self.size - self.at:
            raise _DamagedError(f"{count} strings expected at byte {self.at} of {self.size}")
        at, last, data, unpack = self.at, self.size - 8, self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                raise _DamagedError(f"a string expected at byte {at} of {self.size}")
            at += 8 + unpack(data, at)[0]
        if at > self.size:
            raise _DamagedError(f"a string runs past the end, byte {self.size}")
        self.at = at


def _parse(data: mmap.mmap, size: int) -> Header:
    cursor = _Cursor(data, size)
    if data[:4] != _MAGIC:
        raise _DamagedError("does not begin with GGUF")
    cursor.skip(4)
    version = cursor.take("<I")
    if version not in (2, 3):
        raise _DamagedError(f"GGUF version {version}, 2 or 3 expected")
    n_tensors, n_metadata = cursor.take("<Q"), cursor.take("<Q")
    metadata: dict[str, Any] = {}
    distinct = 0
    for _ in range(n_metadata):
        key, kind = cursor.text(), cursor.take("<I")
        start = cursor.at
        value = cursor.value(kind)
        if key == _TOKENS and kind == _ARRAY:
            if data[start : start + 4] != struct.pack("<I", _STRING):
                raise _DamagedError("the vocabulary is no list of texts")
            distinct = _count_distinct(data, start + 12, value)
        metadata[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    metadata_end = cursor.at
    tensors = tuple(_tensor(cursor) for _ in range(n_tensors))
    alignment = _alignment(metadata)
    data_start = cursor.at + -cursor.at % alignment
    for tensor in tensors:
        end = data_start + tensor.offset + _bytes(tensor)
        if tensor.offset % alignment or end > size:
            raise _DamagedError(f"tensor {_shown(tensor.name)} ends at byte {end} of {size}")
    if not tensors:
        raise _DamagedError("no tensors")
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


def _tensor(cursor: _Cursor) -> Tensor:
    name, n_dims = cursor.text(), cursor.take("<I")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise _DamagedError(f"tensor {_shown(name)} has {n_dims} dimensions")
    shape = tuple(cursor.take("<Q") for _ in range(n_dims))
    kind, offset = cursor.take("<I"), cursor.take("<Q")
    if kind not in TENSOR_TYPES:
        raise _DamagedError(f"tensor {_shown(name)} has type {kind}, which qcat does not make")
    type_name, block, _ = TENSOR_TYPES[kind]
    if shape[0] % block or 0 in shape:
        raise _DamagedError(f"tensor {_shown(name)} has the impossible shape {shape}")
    return Tensor(name, shape, type_name, offset)


def _bytes(tensor: Tensor) -> int:
    _, block, size = next(kind for kind in TENSOR_TYPES.values() if kind[0] == tensor.type)
    return math.prod(tensor.shape) // block * size


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 32 or alignment & (alignment - 1):
        raise _DamagedError(f"alignment {_shown(alignment)}")
    return alignment


def check_model(path: Path, header: Header) -> None:
    """Refuse what `qcat export` does not write, vocabulary included: llama.cpp aborts on some.

    Raises:
        BundleError: naming the file; it may be any GGUF, with a qcat task or without.
    """
    if reason := unfit(header):
        raise BundleError(f"{path}: {reason}: export it again")


def unfit(header: Header) -> str | None:
    """Why a file is not a model of a kind that qcat makes and llama.cpp takes; None if it is."""
    try:
        _check_model(header)
    except _DamagedError as error:
        return str(error)
    return None


def _check_model(header: Header) -> None:
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise _DamagedError(f"architecture {_shown(arch)} is not one that qcat makes")
    for key, value in metadata.items():
        if key == "tokenizer.ggml.model" and value != "gpt2":
            raise _DamagedError(f"tokenizer {_shown(value)} is not one that qcat makes")
        if not key.startswith(f"{arch}."):
            continue
        name = key.removeprefix(f"{arch}.")
        if name in _COUNTS:
            known = type(value) is int and 1 <= value <= _COUNTS[name]
        else:
            known = name in _RATES and isinstance(value, float) and 0 < value < math.inf
        if not known:
            raise _DamagedError(f"metadata {_shown(key)} is {_shown(value)}: qcat knows no such")
    heads = metadata.get(f"{arch}.attention.head_count", 0)
    hidden = metadata.get(f"{arch}.embedding_length", 0)
    width = metadata.get(f"{arch}.attention.key_length", hidden // heads if heads else None)
    if metadata.get(f"{arch}.rope.dimension_count", width) != width:
        raise _DamagedError("rope.dimension_count is not the width of a head")
    kv_heads = metadata.get(f"{arch}.attention.head_count_kv", heads)
    rows = {"attn_q": heads * (width or 0), "attn_k": kv_heads * (width or 0)}
    for tensor in header.tensors:
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if kind in rows and len(tensor.shape) == 2 and tensor.shape[1] != rows[kind]:
            raise _DamagedError(f"tensor {_shown(tensor.name)} does not fit the number of heads")
    if metadata.get(_TOKENS) != header.distinct_tokens:
        raise _DamagedError("a token stands twice in the vocabulary, is empty, or holds a NUL")


def _shown(value: object) -> str:
    """A value from a file, fit for one line of a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _packed_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _without(pairs: bytes, key: str) -> bytes:
    """The metadata pairs less the one under `key`."""
    cursor = _Cursor(pairs, len(pairs))
    while cursor.at < len(pairs):
        start = cursor.at
        found, kind = cursor.text(), cursor.take("<I")
        cursor.value(kind)
        if found == key:
            return pairs[:start] + pairs[cursor.at :]
    return pairs
