"""An F16 or BF16 GGUF to a quantized one, through llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcat.errors import ExportError
from qcat.gguf.header import read_header
from qcat_convert.imatrix import ImportanceMatrix

QUANTIZATIONS = ("q4_k_m", "q4_0", "q5_k_m", "q8_0", "q3_k_m", "iq4_nl")
CANDIDATES = ("q4_0", "q4_k_m", "iq4_nl", "q8_0")
TRAINED_FOR = "q4_0"
"""What an adapter of scales is in already."""
UNPROVED = "q4_k_m"
"""What is made where there are no questions to compare by."""
AUTO = "auto"
"""In the place of one of them: try the candidates, keep the fastest that passes the proof."""
_FALLBACK = re.compile(r"falling back to\s+(\S+)")


@dataclass(frozen=True)
class Quantized:
    """What the quantizer made."""

    types: dict[str, int]
    """Tensors by type, most first."""
    fallbacks: dict[str, int]
    """Tensors whose row length did not fit the wanted type, by the type used instead."""


def quantize(
    source: Path,
    target: Path,
    kind: str,
    *,
    imatrix: ImportanceMatrix | None = None,
    threads: int,
) -> Quantized:
    """Quantize a GGUF file.

    Args:
        source: an F16 or BF16 GGUF.
        target: the file to write.
        kind: one of `QUANTIZATIONS`.
        imatrix: mean squared inputs by tensor name, to round by.
        threads: of computation.

    Raises:
        ExportError: if llama.cpp's quantizer fails, with its reason.
    """
    import llama_cpp

    from qcat.backends.llama import capture_log

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = threads
    if imatrix:
        # `keep` owns the buffers that the C array points into until the call is over
        params.imatrix, keep = _c_array(llama_cpp, imatrix)
    log = capture_log(verbose=False)
    status = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    if imatrix:
        del keep
    if status or not target.is_file():
        reason = next((line.strip() for line in reversed(log) if "fail" in line), "no reason given")
        raise ExportError(f"{target.name}: llama.cpp's quantizer failed: {reason}")
    types = Counter(tensor.type for tensor in read_header(target).tensors)
    fallbacks = Counter(found.upper() for found in _FALLBACK.findall("".join(log)))
    return Quantized(dict(types.most_common()), dict(fallbacks))


def _c_array(llama_cpp: Any, imatrix: ImportanceMatrix) -> tuple[Any, list[Any]]:
    """The matrix as llama.cpp takes it: entries ended by one whose name is NULL."""
    rows = {name: np.ascontiguousarray(row, np.float32) for name, row in imatrix.items()}
    array = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
    for entry, (name, row) in zip(array, rows.items(), strict=False):
        entry.name = name.encode()
        entry.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = row.size
    return array, [rows, array]
