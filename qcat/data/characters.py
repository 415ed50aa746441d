"""Characters that no question should have: lost, invisible, markup, or wrongly decoded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from html.entities import html5

from qcat.spelling import INVISIBLE

_BROKEN = re.compile("[\ufffd\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_DIRECTION = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_JOINER = re.compile("[A-Za-z][\u200c\u200d]|[\u200c\u200d][A-Za-z]")  # else Persian, Hindi, emoji
_ENTITY = re.compile(r"&(#\d{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]{1,31};)")
_TAG = re.compile(
    r"</?(?:a|b|br|code|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|script|span|strong|style|sub|sup"
    r"|table|td|th|tr|u|ul)(?:\s[^<>]*)?/?>|<\|[^<>|\s]+\|>|</?(?:think|tool_call)>",
    re.IGNORECASE,
)
# What bytes 0x80 to 0xBF look like in Windows-1252; the five that it lacks, as in Latin-1
_TAIL = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(0x80, 0xC0)}
_TAILS = "[" + re.escape("".join(_TAIL)) + "]"
# UTF-8 read as Windows-1252: "Ã©" for "é", "â€™" for "’". Not after a capital, as in "AMANHÃ”".
_MOJIBAKE = re.compile(
    f"(?<![A-ZÀ-Þ])(?:[ÂÃ]{_TAILS}|â[€‚†œž]{_TAILS}|ðŸ{_TAILS}{_TAILS})"
)  # fmt: skip


def oddities(text: str) -> Iterator[tuple[str, str, str]]:
    """Code, what was found, what to do."""
    if _BROKEN.search(text):
        yield "broken-text", "a character that was lost in a conversion", "write it anew"
    if found := _CONTROL.search(text):
        shown = f"control character U+{ord(found[0][-1]):04X}"
        yield "control-character", shown, "remove it (--fix does)"
    rtl = any(unicodedata.bidirectional(char) in ("R", "AL") for char in text)
    found = INVISIBLE.search(text) or _JOINER.search(text)
    if found := found or (None if rtl else _DIRECTION.search(text)):
        char = next(c for c in found[0] if not c.isalpha())
        yield "invisible-character", f"invisible U+{ord(char):04X}", "remove it"
    if found := _TAG.search(text) or _entity(text):
        yield "markup", f"markup {found[0]!r}", "write it as plain text"
    if found := _MOJIBAKE.search(text):
        fixed = unmangle(found[0])
        advice = "it was read in the wrong encoding: mend it"
        if fixed != found[0]:
            advice = f"it was {fixed!r} in UTF-8: mend it (--fix does)"
        yield "mojibake", repr(found[0]), advice


def _entity(text: str) -> re.Match[str] | None:
    return next((m for m in _ENTITY.finditer(text) if m[1].startswith("#") or m[1] in html5), None)


def unmangle(text: str) -> str:
    """Repair UTF-8 that was read as Windows-1252, one complete sequence at a time."""

    def decoded(match: re.Match[str]) -> str:
        data = bytes(_TAIL.get(char) or char.encode("cp1252")[0] for char in match[0])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return match[0]

    return _MOJIBAKE.sub(decoded, text)
