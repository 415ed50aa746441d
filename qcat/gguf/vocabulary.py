"""Writes a model's vocabulary and task as a GGUF without weights, from a server's metadata.

With it llama.cpp tokenizes a question here exactly as on the server, which has no call for that.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcat.errors import BundleError

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # GGUF value types
_F32_TENSOR = 0  # GGML tensor type
_ALIGNMENT = 32
_KEPT = ("general.architecture", "qcat.", "tokenizer.ggml.")  # how the keys begin


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write architecture, tokenizer and all of qcat's metadata of a model.

    Args:
        path: file to write. It holds one tensor of zeros, since a GGUF must have some.
        metadata: keys and values as Ollama's `/api/show` gives them under `model_info` when asked
            to be verbose.

    Raises:
        BundleError: a value is not valid for a vocabulary.
    """
    pairs = []
    for key, value in metadata.items():
        if key.startswith(_KEPT):
            try:
                pairs.append(_text(key) + _value(value))
            except (AttributeError, TypeError, ValueError, struct.error):
                raise BundleError(f"metadata {key[:60]!r} is not what qcat writes") from None
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs)
    head += _text("none") + struct.pack("<IQIQ", 1, 1, _F32_TENSOR, 0)
    path.write_bytes(head + b"\0" * (-len(head) % _ALIGNMENT) + struct.pack("<f", 0))


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, Sequence) and value:
        if isinstance(value[0], str):
            kind, items = _STRING, b"".join(map(_text, value))
        elif all(isinstance(item, int) for item in value):
            kind, items = _I32, struct.pack(f"<{len(value)}i", *value)
        else:  # scores, of which JSON writes whole ones without a point
            kind, items = _F32, struct.pack(f"<{len(value)}f", *value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    raise TypeError(type(value).__name__)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
