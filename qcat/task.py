"""The classification task: labels, their descriptions, the instruction and the prompt's wording.

Independent of models. Reads and writes `task.toml`; the prompt is built in
`qcat.encoding.prompt`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from qcat.charset import HEAD, foreign, not_utf8
from qcat.errors import TaskError
from qcat.spelling import difference, fold, looks
from qcat.task_toml import KEYS, parse_task, task_text

Style = Literal["plain", "chat"]
Verbalizer = Literal["name", "code"]
Review = Literal["text", "hash"]

MIN_LABELS, MAX_LABELS = 2, 500
MAX_LABEL_CHARS = 200
MAX_WORD_CHARS = 40
DEFAULT_INSTRUCTION = "Classify the question into exactly one category from the list below."
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CODE = re.compile(r"[A-Z]{2}")


@dataclass(frozen=True)
class Task:
    """One classification task. Building one checks it and normalises its text (NFC, stripped).

    Raises:
        TaskError: names the label or key that cannot be used.
    """

    name: str
    """File and model name: lower-case letters, digits, `.`, `_`, `-`."""
    labels: Mapping[str, str]
    """Label to description (possibly empty). The order matters and is preserved."""
    instruction: str = DEFAULT_INSTRUCTION
    """The first lines of the prompt."""
    question: str = "Question"
    """The word before the question."""
    answer: str = "Category"
    """The word before the answer; if empty, only a line break, which saves two tokens."""
    style: Style = "plain"
    """`plain`, or `chat` for ChatML with an empty think block where the model has one."""
    verbalizer: Verbalizer = "name"
    """What the model writes: the label's `name`, or its two-letter `code`."""
    codes: Mapping[str, str] = field(default_factory=dict)
    """Label to code; empty until chosen for a tokenizer (`qcat.encoding.prompt.with_codes`)."""
    review: Review | None = None
    """What a review queue should store of a question: its `text`, or only its `hash`. This is a
    suggestion: nothing is queued unless the caller asks for it, and a task cannot say where."""

    def __post_init__(self) -> None:
        checked = {
            "name": _checked_name(self.name),
            "labels": _checked_labels(self.labels),
            "instruction": _text(self.instruction, "instruction", lines=True, empty=False),
            "question": _word(self.question, "question"),
            "answer": _word(self.answer, "answer", empty=True),
            "style": _choice(self.style, "style", get_args(Style)),
            "verbalizer": _choice(self.verbalizer, "verbalizer", get_args(Verbalizer)),
        }
        if self.review is not None:
            checked["review"] = _choice(self.review, "review", get_args(Review))
        for key, value in checked.items():
            object.__setattr__(self, key, value)
        object.__setattr__(self, "codes", _checked_codes(self.codes, self.labels))

    @property
    def answers(self) -> tuple[str, ...]:
        """What the model writes for each label, in label order, without the leading space.

        Raises:
            TaskError: if the verbalizer is `code` and no codes have been chosen yet.
        """
        if self.verbalizer == "name":
            return tuple(self.labels)
        if not self.codes:
            raise TaskError(f"task {self.name!r} has no codes yet: they are chosen by a tokenizer")
        return tuple(self.codes[label] for label in self.labels)

    def spelled(self, label: str) -> str | None:
        """The label that this text spells, ignoring case and runs of white space; None if there
        is none."""
        return label if label in self.labels else self._folded.get(fold(label))

    @cached_property
    def _folded(self) -> Mapping[str, str]:
        return {fold(label): label for label in self.labels}

    def only(self, labels: Sequence[str]) -> Task:
        """The task with some of its labels, in the order given."""
        return self.replace(
            labels={label: self.labels[label] for label in labels},
            codes={label: self.codes[label] for label in labels} if self.codes else {},
        )

    def replace(self, **changes: Any) -> Task:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `task.toml` and in a GGUF's metadata."""
        data: dict[str, Any] = {key: getattr(self, key) for key in KEYS[:-3]}
        if self.review:
            data["review"] = self.review
        data["labels"] = dict(self.labels)
        if self.codes:
            data["codes"] = dict(self.codes)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """The inverse of `to_dict`. Raises TaskError for unknown or missing keys."""
        unknown = sorted(str(key) for key in set(data) - set(KEYS))
        if unknown:
            raise TaskError(f"unknown key {unknown[0][:40]!r}: the keys are {', '.join(KEYS)}")
        for key in ("name", "labels"):
            if key not in data:
                raise TaskError(f"key {key!r} is missing")
        return cls(**data)

    @classmethod
    def of_labels(cls, labels: Sequence[str]) -> Task:
        """A task of labels without descriptions. Raises TaskError if one stands twice."""
        for number, label in enumerate(labels):
            if label in labels[:number]:
                raise TaskError(f"label {label[:40]!r} stands twice: keep one")
        return cls("labels", dict.fromkeys(labels, ""))

    @classmethod
    def from_toml(cls, text: str) -> Task:
        """Parse the text of a `task.toml`. Raises TaskError, with the line for a syntax error."""
        return cls.from_dict(parse_task(text))

    def to_toml(self) -> str:
        """The text of a `task.toml` that parses to an equal task."""
        return task_text(self.to_dict())

    @classmethod
    def read(cls, path: str | Path) -> Task:
        """Read `task.toml`. Raises TaskError that names the file."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TaskError(f"{path}: cannot read the task: {error.strerror}") from None
        except ValueError:  # a NUL or a lone surrogate in the name
            raise TaskError(f"{str(path)!r}: no file can have this name") from None
        if what := foreign(data[:HEAD]):
            raise TaskError(f"{path}: {what}")
        try:
            return cls.from_toml(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            # A byte order mark, if any, is not counted.
            line = data.removeprefix(b"\xef\xbb\xbf").count(b"\n", 0, error.start) + 1
            raise TaskError(f"{path}:{line}: {not_utf8(error.object[error.start])}") from None
        except TaskError as error:
            raise TaskError(f"{path}: {error}") from None


def _shown(value: object) -> str:
    """A given value, formatted for one line of a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TaskError(
            f"name {_shown(name)} cannot name a file: use lower-case letters, digits, '.', '_', '-'"
        )
    return name


def _text(
    value: object, where: str, *, lines: bool = False, empty: bool = True, kind: str = "text"
) -> str:
    """NFC, stripped, without control characters (line breaks only where `lines`)."""
    if not isinstance(value, str):
        raise TaskError(
            f"{where}: {kind} expected, found {type(value).__name__} {_shown(value)}: write it in "
            "quotes"
        )
    text = unicodedata.normalize("NFC", value).strip()
    if lines:
        text = "\n".join(line.rstrip() for line in text.splitlines())
    for char in text:
        # Cc control, Cs lone surrogate, Zl and Zp line and paragraph separator
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") and not (lines and char == "\n"):
            raise TaskError(f"{where}: control character U+{ord(char):04X}: remove it")
    if not text and not empty:
        raise TaskError(f"{where}: is empty: write some text")
    return text


def _word(value: object, key: str, *, empty: bool = False) -> str:
    text = _text(value, key, empty=empty)
    if len(text) > MAX_WORD_CHARS:
        raise TaskError(f"{key}: {len(text)} characters, at most {MAX_WORD_CHARS}: a word will do")
    return text


def _choice(value: object, key: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise TaskError(f"{key} {_shown(value)} is not one of {', '.join(allowed)}")
    return str(value)


def _checked_labels(labels: object) -> dict[str, str]:
    if not isinstance(labels, Mapping):
        raise TaskError('labels: a table expected, one line a label: "pool" = "what it covers"')
    checked: dict[str, str] = {}
    seen: dict[str, str] = {}
    for raw, description in labels.items():
        label = _text(raw, f"label {_shown(raw)}", empty=False)
        if len(label) > MAX_LABEL_CHARS:
            raise TaskError(
                f"label {label[:30] + '…'!r}: {len(label)} characters, "
                f"at most {MAX_LABEL_CHARS}: shorten it and move the rest to its description"
            )
        other = seen.setdefault(looks(label), label)
        if other != label or label in checked:
            raise TaskError(f"labels {other!r} and {label!r} {difference(other, label)}: keep one")
        checked[label] = _text(description, f"label {label!r}: description")
    if not MIN_LABELS <= len(checked) <= MAX_LABELS:
        raise TaskError(
            f"labels: {len(checked)} given, from {MIN_LABELS} to {MAX_LABELS} can be told apart"
        )
    return checked


def _checked_codes(codes: object, labels: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(codes, Mapping):
        raise TaskError("codes: a table expected, label to two capital letters")
    if not codes:
        return {}
    given: dict[str, str] = {}
    for raw, code in codes.items():
        label = _text(raw, f"codes: label {_shown(raw)}")
        if label not in labels:
            raise TaskError(f"codes: {_shown(label)} is not among the labels")
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise TaskError(f"codes: {label!r} has {_shown(code)}: two capital letters expected")
        if code in given.values():
            raise TaskError(f"codes: {code!r} stands for two labels: one code a label")
        given[label] = code
    missing = [label for label in labels if label not in given]
    if missing:
        raise TaskError(f"codes: {missing[0]!r} has none: give all labels a code, or none")
    return {label: given[label] for label in labels}
