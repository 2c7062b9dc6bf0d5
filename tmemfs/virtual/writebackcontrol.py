"""The control file `writeback`: lists the dirty files, and turns write-back off before an unmount.

The first line is `1` (on) or `0` (off). Then follows a line for each dirty file, at most MAX_LINES: path, dirty pages,
and the reason of the last failure since write-back was turned off, separated by tabs.
"""

from __future__ import annotations

import itertools
import logging
from typing import NamedTuple

from tmemcommon.texts import printable
from tmemfs.fuse.virtualfiles import InvalidInput
from tmemfs.io.writeback import Writeback
from tmemfs.virtual.controlfiles import ControlFiles

log = logging.getLogger(__name__)

NAME = "writeback"
OFF, ON, GIVE_UP = b"0", b"1", b"give up"
MAX_LINES = 100


class Unwritten(NamedTuple):
    """A file with dirty pages. `reason`: why its last write-back failed; empty if none failed."""

    path: str
    pages: int
    reason: str


class WritebackControl:
    """The control file of one guest."""

    def __init__(self, files: ControlFiles, writeback: Writeback) -> None:
        self._writeback = writeback
        files.add_control(NAME, self._show, self._set, private=True)

    def _show(self) -> str:
        rows = (
            f"{printable(inode.display_path)}\t{len(inode.file.dirty_pages())}\t"
            f"{(error.strerror or error) if error else ''}"
            for inode, error in self._writeback.unwritten()
        )
        return "\n".join(["0" if self._writeback.suspended else "1", *itertools.islice(rows, MAX_LINES)])

    async def _set(self, data: bytes) -> None:
        """Turn write-back on (`1`) or off (`0`). `give up`: off, and pages that are dirty at the end are lost."""
        word = data.strip()
        if word not in (OFF, ON, GIVE_UP):
            raise InvalidInput("what to write is 1 (on), 0 (off) or: give up")
        if self._writeback.suspended != (word != ON):
            log.info("write-back is turned %s", "on" if word == ON else "off: writes go through")
        if word == ON:
            self._writeback.resume()
        else:
            self._writeback.suspend(give_up=word == GIVE_UP)


def parse(shown: bytes) -> list[Unwritten]:
    """Parse the content of the control file."""
    rows = (line.split("\t") for line in shown.decode().splitlines()[1:])
    return [Unwritten(path, int(pages), reason) for path, pages, reason in rows]
