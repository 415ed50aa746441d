"""Explains why a text is not JSON, or an object not a row, and names common mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qcat.data.columns import CHATS, likely, listed, plain_name
from qcat.data.first_lines import YAML

_TYPOGRAPHIC = "‘’‚‛“”„‟«»"
_TRAILING = re.compile(r",\s*[}\]]")
_PYTHON = re.compile(r"(?:None|True|False|undefined)\b")


def shape_fault(
    fields: Mapping[str, Any], named: Collection[str], absent: Sequence[str], shape: str
) -> str | None:
    """What is wrong with an object that contains the values of many rows, or nested rows.

    Args:
        fields: the object.
        named: those of its keys that a row has.
        absent: the names of keys that it lacks.
        shape: what an object should look like.
    """
    advice = f"write one object a line, {shape}"
    alike = fields if absent else named
    enough = len(named) > 1 or (absent and any(map(_known, fields)))
    if enough and all(_is_column(fields[key]) for key in alike):
        return f'columns, not rows: {advice} (pandas: to_json(orient="records", lines=True))'
    spare = [key for key, value in fields.items() if isinstance(value, str) and key not in named]
    deeper = [key for key, value in fields.items() if isinstance(value, list | dict)]
    if deeper and len(spare) < len(absent) and not any(key in CHATS for key in fields):
        keys = f"key{'s' if len(absent) > 1 else ''} {' and '.join(map(repr, absent))}"
        return f"no {keys} but nested values under {listed(deeper)}: {advice}"
    return None


def _is_column(value: Any) -> bool:
    """Whether a value contains those of many rows, in a list or by their numbers."""
    if isinstance(value, dict):
        return bool(value) and all(key.isdecimal() for key in value)
    return (
        isinstance(value, list)
        and bool(value)
        and not any(isinstance(one, list | dict) for one in value)
    )


def _known(key: str) -> bool:
    return any(likely(plain_name(key), wanted) for wanted in ("text", "label"))


def json_fault(text: str, error: Exception) -> str:
    """What is wrong with a text.

    Args:
        text: that was parsed; one line of JSONL, or a whole file.
        error: what the parser said: a JSONDecodeError, a RecursionError, or for a number of too
            many digits a ValueError.
    """
    if not isinstance(error, json.JSONDecodeError):
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number too long"
        return f"not a JSON object: {reason}"
    return f"not a JSON object: {_slip(text, error) or _plain(text, error)}"


def _slip(text: str, error: json.JSONDecodeError) -> str | None:
    at, rest = error.pos, text[error.pos :].strip()
    if error.msg == "Extra data":
        if rest == ",":
            return "a comma after the object: remove it"
        if rest[:1] in "{[":
            return "several objects on one line: write one a line"
        return None
    if rest.startswith("\ufeff"):
        return "a byte order mark within the file, as joined files have: remove it"
    if error.msg.startswith("Unterminated string"):
        return f"the text that begins in column {error.colno} does not end: the line is cut off"
    if not rest:
        return "it does not end: the line is cut off"
    if _TRAILING.match(text, text.rfind(",", 0, at + 1)):
        return "a comma after the last value: remove it"
    if rest.startswith("'"):
        return 'single quotes: JSON has double ones, "text"'
    if rest[0] in _TYPOGRAPHIC:
        return 'typographic quotes: write straight ones, "text"'
    if found := _PYTHON.match(rest):
        return f"{found[0]} is not JSON: write null, true or false, or a text in quotes"
    if error.msg.startswith("Invalid control character"):
        return f"control character U+{ord(text[at]):04X} in a text: remove it, or escape it"
    if error.msg.startswith("Invalid \\"):
        return f"a backslash in column {error.colno}: write it twice"
    if error.msg.startswith("Expecting property name"):
        return f"a key without double quotes in column {error.colno}"
    return None


def _plain(text: str, error: json.JSONDecodeError) -> str:
    shown = text[error.pos :].strip().partition("\n")[0][:20]
    if YAML.match(text):
        return "it looks like YAML: write JSON, one object a line"
    if not text[: error.pos].strip() and error.msg == "Expecting value":
        return f"found {shown!r}: write {{…}}, or name a CSV file .csv"
    return f"{error.msg} in column {error.colno}, found {shown!r}"
