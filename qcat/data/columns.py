"""Names of columns: which of a file's is meant, and what to say where one is missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from qcat.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 8  # names of columns in a message
# What others call the columns. They are not read as such: a file may have several of these.
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
    """Refuse names of columns that not every format can have.

    Args:
        place: of the names, for the message.
        names: of all columns.

    Raises:
        DataError: a name stands twice, or cannot be written.
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
    """The column of a name; else the one whose name differs in case or outer spaces only.

    Raises:
        DataError: two columns are meant by the name, without the place.
    """
    if wanted in columns:
        return wanted
    plain = plain_name(wanted)
    found = [name for name in columns if plain_name(name) == plain]
    if len(found) > 1:
        raise DataError(f"both {listed(found)} could be {wanted!r}: rename one")
    return found[0] if found else None


def missing(wanted: Sequence[str], found: Sequence[str], kind: str = "column") -> str:
    """What to say where columns are missing: which, what there is, and what to rename.

    Args:
        wanted: their names.
        found: all names there are.
        kind: what the format calls them, in the singular.
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
    """A name of a column without what case and outer spaces make of it."""
    return name.strip().casefold()


def likely(name: str, wanted: str) -> bool:
    """Whether a plain name is one of `text` or `label`, or one that others give such a column."""
    return name == wanted or name in _LIKELY[wanted]


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message, the first ones of many."""
    shown = [repr(name if len(name) <= 40 else f"{name[:39]}…") for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
