"""The review queue as a CSV to fill in with a spreadsheet; `read_answers` imports it."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence

from qcat.monitor.review import Entry
from qcat.monitor.review_import import GUARD

_FORMULA = ("=", "+", "-", "@")


def questions_csv(entries: Sequence[Entry]) -> bytes:
    """Columns `hash`, `text`, `seen`, `suggested` (the model's label) and `label`, which is empty.

    A cell that a spreadsheet would interpret as a formula gets a leading apostrophe.
    """
    file = io.StringIO()
    rows = csv.writer(file)
    rows.writerow(["hash", "text", "seen", "suggested", "label"])
    for entry in entries:
        text, label = _guarded(entry.text or ""), _guarded(entry.label)
        rows.writerow([entry.hash, text, entry.seen, label, ""])
    # Without the byte order mark Excel does not read it as UTF-8.
    return file.getvalue().encode("utf-8-sig")


def _guarded(cell: str) -> str:
    # The wide forms of these, from Chinese or Japanese keyboards, also begin a formula.
    begins = unicodedata.normalize("NFKC", cell[:1]).startswith(_FORMULA)
    return GUARD + cell if begins else cell
