"""Parses and writes the text of a `task.toml`, and explains what is wrong with an invalid one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w

from qcat.errors import TaskError

KEYS = (
    "name", "instruction", "question", "answer", "style", "verbalizer", "review", "labels", "codes",
)  # fmt: skip
"""The keys of a task, in the order in which they are written."""
_AT = re.compile(r"\(at line (\d+), column \d+\)")
_TYPOGRAPHIC = re.compile("[\u2018-\u201f\u00ab\u00bb]")
_YAML = re.compile(r"\s*(?:- |[\w ]+:(?:\s|$)|---)")
_WORDS = re.compile(r"([\w&/' -]+?)\s*(?:=.*)?")


def parse_task(text: str) -> dict[str, Any]:
    """The keys and values of a `task.toml`.

    Raises:
        TaskError: it is not TOML (names the line); a key of the task is among the labels, where it
            would be one more label; or a label has a table instead of a description.
    """
    if not text.strip():
        raise TaskError(
            "is empty: write a task, or have `qcat init` make one of labelled questions"
        )
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise TaskError("not valid TOML: it is nested too deeply") from None
    except ValueError as error:
        raise TaskError(_fault(text, str(error))) from None
    labels = data.get("labels")
    if isinstance(labels, Mapping):
        _check_labels(labels, text)
    return data


def task_text(data: Mapping[str, Any]) -> str:
    """The text that `parse_task` reads back; all labels are quoted."""
    tables = {key: data[key] for key in ("labels", "codes") if key in data}
    text = tomli_w.dumps({key: value for key, value in data.items() if key not in tables})
    for key, table in tables.items():
        lines = (f"{_quoted(label)} = {_quoted(value)}\n" for label, value in table.items())
        text += f"\n[{key}]\n{''.join(lines)}"
    return text


def _quoted(text: str) -> str:
    return tomli_w.dumps({"x": text}).removeprefix("x = ").removesuffix("\n")


def _check_labels(labels: Mapping[str, Any], text: str) -> None:
    for label, value in labels.items():
        if label in KEYS and not re.search(rf"(?m)(?:^|[{{,])\s*([\"']){label}\1\s*=", text):
            raise TaskError(
                f"{label} is a key of the task, but stands among the labels: move it above "
                f'[labels], or write "{label}" in quotes if it is a label'
            )
        if isinstance(value, Mapping):
            dotted = f"{label}.{next(iter(value), '…')}"
            raise TaskError(
                f"label {label[:60]!r} has a table and no description: quote a name with a dot, as "
                f'in {dotted[:60]!r} = ""'
            )


def _fault(text: str, error: str) -> str:
    """What is wrong with a text that is not TOML."""
    if text.lstrip().startswith("{"):
        return 'not valid TOML but JSON: write name = "house", then [labels], then "pool" = ""'
    found = _AT.search(error)
    number = int(found[1]) if found else text.count("\n") + 1
    advice = _advice(text.split("\n")[number - 1], error)
    return f"not valid TOML: line {number}: {advice}" if advice else f"not valid TOML: {error}"


def _advice(line: str, error: str) -> str | None:
    """What is wrong with a line, if it is one of the common mistakes."""
    if "overwrite" in error:
        return f"{line.partition('=')[0].strip()[:60]!r} stands twice: keep one"
    if _TYPOGRAPHIC.search(line):
        return 'typographic quotes: write straight ones, "…"'
    if _YAML.match(line):
        return 'it looks like YAML: write name = "house", then [labels], then "pool" = ""'
    if "'='" in error and (words := _WORDS.fullmatch(line.strip()[:100])):
        label = _quoted(words[1])
        return f'put the label in quotes, and a description after it, as in {label} = ""'
    return None
