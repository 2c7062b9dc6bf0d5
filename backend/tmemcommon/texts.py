"""Escape untrusted text (names, paths, messages of peers) before it is printed or logged.

Such text may contain bytes that are not UTF-8, and control characters that move a terminal's cursor or fake other
lines. Everything that is printed or logged goes through here.
"""

from __future__ import annotations

import logging

_ELLIPSIS = "…"


def printable(text: str) -> str:
    r"""Return text with everything that is not printable escaped: `\x1b`, `\n`, `\xff`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a path that is not UTF-8 (surrogateescape)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shortened(text: str, length: int) -> str:
    """Return text of at most `length` characters. The middle is cut: name and remedy are at the ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return text[: length - 1 - tail] + _ELLIPSIS + (text[-tail:] if tail else "")


class LogFormatter(logging.Formatter):
    """Formats each message as one line, with names escaped; a traceback follows in lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # the name in logging
        """Format a record as one line."""
        return printable(super().formatMessage(record))
