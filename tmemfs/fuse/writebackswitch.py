"""The control file `writeback`: tell which files are not written back yet, and turn write-back off before an unmount.

It shows `1` or `0`, and a line for each of the first dirty files: path, pages and, once it has been tried in vain since
write-back was turned off, why not; with tabs between them.
"""

from __future__ import annotations

import itertools
import logging
from typing import NamedTuple

from tmemcommon.texts import printable
from tmemfs.fuse.control import BadControlInput, Control
from tmemfs.io.writeback import Writeback

log = logging.getLogger(__name__)

NAME = "writeback"
OFF, ON, GIVE_UP = b"0", b"1", b"give up"
MAX_LINES = 100


class Unwritten(NamedTuple):
    """A file that has dirty pages; `reason` is empty as long as nothing is known to be wrong."""

    path: str
    pages: int
    reason: str


class WritebackSwitch:
    """The control file of one guest."""

    def __init__(self, control: Control, writeback: Writeback) -> None:
        self._writeback = writeback
        control.add_switch(NAME, self._show, self._set, private=True)

    def _show(self) -> str:
        rows = (
            f"{printable(inode.title)}\t{len(inode.dirty)}\t{(error.strerror or error) if error else ''}"
            for inode, error in self._writeback.unwritten()
        )
        return "\n".join(["0" if self._writeback.suspended else "1", *itertools.islice(rows, MAX_LINES)])

    async def _set(self, data: bytes) -> None:
        """Turn write-back off (`0`), on (`1`), or off and `give up` what is dirty when the mount ends."""
        word = data.strip()
        if word not in (OFF, ON, GIVE_UP):
            raise BadControlInput("what to write is 1 (on), 0 (off) or: give up")
        if self._writeback.suspended != (word != ON):
            log.info("write-back is turned %s", "on" if word == ON else "off: writes go through")
        if word == ON:
            self._writeback.resume()
        else:
            self._writeback.suspend(give_up=word == GIVE_UP)


def parse(shown: bytes) -> list[Unwritten]:
    """Return the files that the control file shows."""
    rows = (line.split("\t") for line in shown.decode().splitlines()[1:])
    return [Unwritten(path, int(pages), reason) for path, pages, reason in rows]
