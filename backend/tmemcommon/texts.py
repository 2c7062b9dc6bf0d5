"""Text that somebody else chose, made fit to be shown: a name, a path, what a peer says of itself.

Such text may hold what moves a terminal's cursor, colours what follows or pretends to be another line, and bytes that
are no text at all. Whatever prints or logs goes through here.
"""

from __future__ import annotations

import logging

_ELLIPSIS = "…"


def printable(text: str) -> str:
    r"""Return text on one line with what no terminal may get written as an escape: `\x1b`, `\n`, `\xff`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is no text, as Python hands it over in a path
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shortened(text: str, most: int) -> str:
    """Return text of at most so many characters: the middle is left out, as names and remedies stand at the ends."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return text[: most - 1 - tail] + _ELLIPSIS + (text[-tail:] if tail else "")


class LogFormatter(logging.Formatter):
    """Keeps each message on its line, whatever names it holds; a traceback follows in lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        """Return the line of a record."""
        return printable(super().formatMessage(record))
