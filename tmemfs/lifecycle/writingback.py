"""Have a mount with write-back write everything before it is unmounted: what fails afterwards nobody can be told.

Write-back is turned off first. From then on writes go through, so once nothing is dirty nothing can be lost any more.
"""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Protocol

from tmemcommon.commandline import CommandError, say
from tmemfs.virtual.writebackcontrol import GIVE_UP, NAME, OFF, ON, Unwritten, parse

_LOOK_SECONDS = 0.1
_TOLD_SECONDS = 1.0  # of which nobody has to be told
_TOLD_AGAIN_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_SHOWN = 5


class Unwritable(enum.Enum):
    """What is done about files that cannot be written back."""

    REFUSE = enum.auto()
    WAIT = enum.auto()
    DISCARD = enum.auto()


class UnwrittenError(CommandError):
    """Report that a mount stays, because it holds what could not be written back."""


class Switched(Protocol):
    """A mount whose control files can be used."""

    mountpoint: Path

    def read(self, name: str) -> bytes:
        """Read a control file."""

    def write(self, name: str, content: bytes) -> None:
        """Write a control file."""


def write_back(mount: Switched, unwritable: Unwritable, seconds: float) -> None:
    """Turn write-back off and wait until everything is written. Raises UnwrittenError, and turns it on again.

    With WAIT what fails is tried again for ever, without it once. With DISCARD what has failed, or is not written after
    `seconds`, will be dropped with the mount.
    """
    mount.write(NAME, OFF)
    try:
        left = _until_written(mount, unwritable, seconds)
        if not left:
            return
        names = _describe(left)
        if unwritable is not Unwritable.DISCARD:
            raise UnwrittenError(
                f"'{mount.mountpoint}' stays mounted, it holds what is not written back: {names}; "
                "--wait-backing goes on trying, --discard gives it up"
            )
        mount.write(NAME, GIVE_UP)
        say(f"'{mount.mountpoint}': what is not written back will be lost with the mount: {names}")
    except BaseException:
        mount.write(NAME, ON)
        raise


def _until_written(mount: Switched, unwritable: Unwritable, seconds: float) -> list[Unwritten]:
    """Wait for the end of the write-back; return what is left when it makes no sense to wait longer."""
    began = tried = time.monotonic()
    tell, told = began + _TOLD_SECONDS, ""
    while left := parse(mount.read(NAME)):
        now = time.monotonic()
        failed = sum(bool(file.reason) for file in left)
        if unwritable is Unwritable.WAIT:
            if failed and now >= tried + _RETRY_SECONDS:
                tried = now
                mount.write(NAME, OFF)
        elif now >= began + seconds or failed == len(left) or (failed and unwritable is Unwritable.REFUSE):
            return left
        names = _describe(left)
        if now >= tell and names != told:
            say(f"'{mount.mountpoint}' is being written back: {names}")
            tell, told = now + _TOLD_AGAIN_SECONDS, names
        time.sleep(_LOOK_SECONDS)
    return []


def _describe(files: list[Unwritten]) -> str:
    """Name files, and what is wrong with them."""
    names = [f"'{file.path}' ({file.reason or 'being written'})" for file in files[:_SHOWN]]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
