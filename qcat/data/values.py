"""Converts values between CSV, JSON and Parquet."""

from __future__ import annotations

import json
import math
import re
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_EXACT = 2**53  # up to this, a double represents every whole number


def cell(value: Any) -> str:
    """A value as a CSV cell."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return utf8(value) if isinstance(value, str) else json_if_any(value) or ""


def json_if_any(value: Any) -> str | None:
    """A value as JSON, or None for null."""
    text = json_text(value)
    return None if text == "null" else text


def json_text(value: Any) -> str:
    try:
        text = _ENCODE(value)
    except ValueError:
        value = _finite(value)
        text = _ENCODE(value)
    # A lone surrogate can only be escaped.
    return json.dumps(value, allow_nan=False) if SURROGATE.search(text) else text


def _finite(value: Any) -> Any:
    """A value in which numbers that JSON cannot represent are replaced by None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [_finite(item) for item in value]
        case dict():
            return {name: _finite(item) for name, item in value.items()}
    return value


def utf8(text: str) -> str:
    return SURROGATE.sub("\ufffd", text)


def json_kind(value: Any) -> str:
    """The kind of a value of JSON: a `Kind`, `long` (a whole number that only a whole column has
    room for), `json` or `none`."""
    match value:
        case None:
            return "none"
        case bool():
            return "bool"
        case int():
            if -_EXACT <= value <= _EXACT:
                return "whole"
            return "long" if -(2**63) <= value < 2**63 else "json"
        case float():
            return "real"
        case str():
            return "text"
    return "json"


def common_kind(seen: set[str]) -> str:
    """The kind that a column with values of these kinds has: a `Kind`, or `json`."""
    kinds = seen - {"none"}
    for kind, may_hold in (
        ("text", {"text"}),
        ("bool", {"bool"}),
        ("whole", {"whole", "long"}),
        ("real", {"whole", "real"}),
    ):
        if kinds <= may_hold:
            return kind
    return "json"


def fitting(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if isinstance(value, str):
        return utf8(value)
    return json_if_any(value) if kind == "json" else value


def arrow_type(kind: str) -> Any:
    import pyarrow

    types = {"bool": pyarrow.bool_(), "whole": pyarrow.int64(), "real": pyarrow.float64()}
    return types.get(kind, pyarrow.string())


def _is_text_elsewhere(type_: Any) -> bool:
    """Whether values of an Arrow type become text in other formats than Parquet."""
    from pyarrow import types

    return bool(types.is_temporal(type_) or types.is_decimal(type_))


def _is_plain(type_: Any) -> bool:
    """Whether JSON can represent values of an Arrow type."""
    from pyarrow import types

    if types.is_struct(type_):
        return all(_is_plain(field.type) for field in type_)
    if types.is_map(type_):
        return _is_plain(type_.key_type) and _is_plain(type_.item_type)
    if any(
        is_so(type_)
        for is_so in (
            types.is_dictionary,
            types.is_list,
            types.is_large_list,
            types.is_fixed_size_list,
        )
    ):
        return _is_plain(type_.value_type)
    return any(
        is_so(type_)
        for is_so in (
            types.is_null,
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_string,
            types.is_large_string,
            types.is_string_view,
        )
    )


def has_form(type_: Any) -> bool:
    return _is_plain(type_) or _is_text_elsewhere(type_)


def plain(batch: Any) -> Any:
    """A batch in which values that JSON cannot represent are text."""
    import pyarrow
    from pyarrow import compute

    columns = [
        compute.cast(column, pyarrow.string()) if _is_text_elsewhere(column.type) else column
        for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
