"""Column names: finds a column in a file, and explains which are missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from qcat.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 8  # names of columns in a message
# Other common column names. They are not accepted: a file may have several of them.
_LIKELY = {
    "text": (
        "question", "query", "prompt", "utterance", "sentence", "message", "content", "title",
        "request", "input", "frage",
    ),
    "label": (
        "category", "class", "intent", "completion", "target", "topic", "labels", "label_text",
        "tag", "answer", "output", "kategorie",
    ),
}  # fmt: skip
CHATS = ("messages", "conversations", "conversation")


def check_names(place: str, names: Sequence[str]) -> None:
    """Reject column names that not every format supports.

    Args:
        place: place of the names, for the message.
        names: names of all columns.

    Raises:
        DataError: a name occurs twice, or cannot be written.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            called = f"are called {name!r}: rename one" if name else "have no name: name them"
            raise DataError(f"{place}: two columns {called}")
        if _SURROGATE.search(name):
            raise DataError(f"{place}: a column's name, {name!r}, is not UTF-8: rename it")
        seen.add(name)


def find_column(columns: Collection[str], wanted: str) -> str | None:
    """The column with a name, or the one whose name differs only in case or outer spaces.

    Raises:
        DataError: two columns match the name. The message does not contain the place.
    """
    if wanted in columns:
        return wanted
    plain = plain_name(wanted)
    found = [name for name in columns if plain_name(name) == plain]
    if len(found) > 1:
        raise DataError(f"both {listed(found)} could be {wanted!r}: rename one")
    return found[0] if found else None


def missing(wanted: Sequence[str], found: Sequence[str], kind: str = "column") -> str:
    """The message for missing columns: which, what there is, and what to rename.

    Args:
        wanted: names of the missing columns.
        found: names of all existing columns.
        kind: the format's word for a column.
    """
    named = " and ".join(map(repr, wanted))
    said = f"no {kind}{'s' if len(wanted) > 1 else ''} {named}"
    if not found:
        return f"{said}: there is none"
    if chat := next((name for name in found if name in CHATS), None):
        return f'{said} but a chat under {chat!r}: write {{"text": question, "label": category}}'
    likely = {
        want: [name for name in found if plain_name(name) in _LIKELY.get(want, ())]
        for want in wanted
    }
    renamed = [f"{names[0]!r} to {want!r}" for want, names in likely.items() if len(names) == 1]
    advice = f"rename {' and '.join(renamed)}" if renamed else f"name them {named}"
    if not renamed and len(wanted) == 1:
        advice = f"name one {named}"
    return f"{said}: there are {listed(found)}: {advice}"


def plain_name(name: str) -> str:
    """A column name, case-folded and without outer spaces."""
    return name.strip().casefold()


def likely(name: str, wanted: str) -> bool:
    """Whether a plain name is `text` or `label`, or another common name for such a column."""
    return name == wanted or name in _LIKELY[wanted]


def listed(names: Sequence[str]) -> str:
    """Column names for a message; only the first if there are many."""
    shown = [repr(name if len(name) <= 40 else f"{name[:39]}…") for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
