"""Explains a wrong header line of a CSV file from the file's first lines."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from qcat.data.columns import likely, plain_name

LOOKED_AT = 12
"""Lines that are not blank, among which the header line is looked for."""
YAML = re.compile(r"---\s*$|\s*- (?:[\"']?\w+[\"']?:\s|\{)")
"""How a line of YAML begins that is a list of rows."""
_JSON = re.compile(r"""\s*(?:\{\s*(?:["'}]|$)|\[\s*(?:[{["]|$))""")
_SEPARATORS = re.compile(r"[,;\t|]")


def header_fault(names: Sequence[str], lines: Sequence[tuple[int, str]]) -> str | None:
    """What is wrong with a header line, without the place.

    Args:
        names: column names read from the line; empty if it is not CSV.
        lines: the first lines that are not blank, with their numbers, the header line first.
    """
    if not lines:
        return None
    first = lines[0][1]
    if _JSON.match(first):
        return "looks like JSON: name the file .jsonl"
    if YAML.match(first):
        return "looks like YAML: write CSV, or JSON, one object a line"
    plain = {plain_name(name) for name in names}
    if plain & {"text", "label"}:
        return None
    if len(names) == 1 or not (names or re.search("[,;\t]", first)):
        words = {_bare(word) for word in re.split(r"[,;|:\s]+", first)}
        if {"text", "label"} <= words:
            return "what separates the columns cannot be told: separate them by commas"
    elif names and {"text", "label"} <= {_bare(word) for word in _SEPARATORS.split(first)}:
        return "the columns are separated in two ways: separate them by commas alone"
    for number, line in lines[1:]:
        if _is_header({_bare(word) for word in _SEPARATORS.split(line)}, first, names):
            return f"the header line is not the first: remove the lines above line {number}"
    if names and not any(names):
        return "the header line is empty: remove it, or write the names of the columns"
    return None


def _is_header(words: Collection[str], first: str, names: Sequence[str]) -> bool:
    """Whether a line has names of columns; which ones are enough depends on what is above it."""
    if {"text", "label"} <= set(words):
        return True
    title = first.startswith("#") or sum(map(bool, names)) < 2
    return title and all(any(likely(word, one) for word in words) for one in ("text", "label"))


def _bare(word: str) -> str:
    return plain_name(word.strip().strip('"\ufeff'))
