"""Identifies files that should be UTF-8 text but are not, for messages."""

from __future__ import annotations

import re

HEAD = 64
"""Number of bytes at a file's start that `foreign` needs."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""The start of a Git LFS pointer file."""
IS_POINTER = "a Git LFS pointer, not the file: fetch that with `git lfs pull`"
_ARROW = "an Arrow file: write the table as Parquet"
_PICKLE = "a pickle of Python: write the table as CSV or Parquet"
_SIGNATURES = (
    (b"PK\x03\x04", "an Excel workbook or other ZIP file: save the table as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook: save the table as CSV UTF-8"),
    (b"\x1f\x8b", "a gzip file: unpack it"),
    (b"BZh", "a bzip2 file: unpack it"),
    (b"\xfd7zXZ", "an xz file: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it"),
    (b"%PDF-", "a PDF: save the table as CSV UTF-8"),
    (b"SQLite format 3\0", "an SQLite database: export the table as CSV"),
    (b"{\\rtf", "an RTF document: save it as plain text"),
    (b"ARROW1", _ARROW),
    (b"\xff\xff\xff\xff", _ARROW),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"PAR1", "a Parquet file: name it .parquet"),
    (b"GGUF", "a GGUF model: name a file of text"),
    (POINTER, IS_POINTER),
    (b"<!doctype html", "a web page: download the file itself"),
    (b"<html", "a web page: download the file itself"),
    (b"<table", "a table of HTML: save the table as CSV UTF-8"),
    (b"<?xml", "XML, as old Excel workbooks are: save the table as CSV UTF-8"),
)
_PAIRS = re.compile(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]")
_ESCAPED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte


def foreign(head: bytes) -> str | None:
    """The kind of file by its first `HEAD` bytes, with advice; None if it may be UTF-8 text."""
    if wide := wider(head):
        return wide
    lowered = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, what in _SIGNATURES:
        if head.startswith(signature) or (signature[:1] == b"<" and lowered.startswith(signature)):
            return what
    if len(head) == HEAD and not head.strip(b"\0"):
        return "nothing but zero bytes: it is damaged, take a copy"
    return None


def wider(head: bytes) -> str | None:
    """Whether text is UTF-16 or UTF-32, in the words of `foreign`.

    UTF-16 without a byte order mark is recognized by a NUL in every other byte, if it begins with
    two characters of Latin-1.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "not UTF-8 but UTF-32: save it as UTF-8"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _PAIRS.match(head):
        return "not UTF-8 but UTF-16: save it as UTF-8"
    return None


def not_utf8(byte: int) -> str:
    """The message for a byte that is not UTF-8, with its character in Windows-1252."""
    char = bytes([byte]).decode("cp1252", "ignore")
    likely = f", {char!r} in Windows-1252" if char.isprintable() and char else ""
    return f"not UTF-8 (byte 0x{byte:02X}{likely}): save it as UTF-8"


def escaped_byte(text: str) -> int | None:
    """The first byte that is not UTF-8, of a text decoded with `surrogateescape`."""
    found = _ESCAPED.search(text)
    return ord(found[0]) - 0xDC00 if found else None
