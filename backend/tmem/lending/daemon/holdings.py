"""What guests hold, in a small file: a tmemd that is started again must not lend that to newcomers.

The file says a little more than is held, so that it is true whenever tmemd is killed and yet written once for many
lends: each guest has a credit on top, and when that is used up the file is written again before the next slab is made
real. It is replaced atomically and not synced: it need not outlive the machine, on which no guest would.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from tmem.lending.daemon.processes import Process
from tmem.lending.lender.actions import Holding
from tmem.lending.protocol.kind import Kind

log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """What one guest's process holds at most, in slabs, and how it is known again."""

    holding: Holding
    started: int  # start time of the process: its pid may be used again

    @classmethod
    def of(cls, holding: Holding, process: Process, credit: int) -> Record:
        """Add `credit` slabs of each kind to what is held, but not to an evicted guest: nothing is lent to it."""
        credit = 0 if holding.settings.evicted else credit
        cap = holding.settings.persistent_cap
        persistent = max(
            holding.persistent, min(holding.persistent + credit, holding.slabs // 2 if cap is None else cap)
        )
        ephemeral = min(holding.ephemeral + credit, holding.slabs - persistent)
        return cls(replace(holding, pid=process.pid, ephemeral=ephemeral, persistent=persistent), process.started)

    @property
    def process(self) -> Process:
        """The guest's process."""
        return Process(self.holding.pid, self.started, self.holding.uid)

    def flat(self) -> dict[str, Any]:
        """Return the entry of the file: all fields side by side."""
        fields: dict[str, Any] = msgspec.to_builtins(self.holding)
        return {"started": self.started, **fields.pop("settings"), **fields}

    @classmethod
    def parse(cls, flat: dict[str, Any]) -> Record:
        """Read an entry of the file; msgspec.ValidationError when it is not one."""
        return msgspec.convert({"holding": {**flat, "settings": flat}, "started": flat.get("started")}, cls)


class Holdings:
    """Keep the file ahead of what is held. `credit` slabs of each kind are put down on top for each guest."""

    def __init__(self, path: Path, credit: int) -> None:
        self._path = path
        self.credit = credit
        self._left: dict[tuple[bytes, Kind], int] = {}
        self.writes = self.failures = 0

    def load(self) -> list[Record]:
        """Read what the tmemd before left; nothing when there is no such file, or not one of ours."""
        try:
            return [Record.parse(flat) for flat in msgspec.json.decode(self._read(), type=list[dict[str, Any]])]
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("what older guests hold is not known: %s cannot be read: %s", self._path, error)
        return []

    def _read(self) -> bytes:
        """Read the file; beside a socket in /tmp it may be anything of anybody's."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it is not a file of this user's")
            return file.read()

    def cover(self, token: bytes, kind: Kind, slabs: int, records: Callable[[], Iterable[Record]]) -> None:
        """Have the file say at least what is held once `slabs` more are; `records` gives that, with them."""
        left = self._left.get((token, kind), 0) - slabs
        if left < 0:
            self.write(records())
        else:
            self._left[token, kind] = left

    def write(self, records: Iterable[Record]) -> None:
        """Replace the file."""
        known = list(records)
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.encode([record.flat() for record in known]))
            fresh.rename(self._path)
            self.writes += 1
        except OSError as error:
            if not self.failures:
                log.warning("a tmemd after this one will not know what guests hold: %s: %s", self._path, error)
            self.failures += 1
        # Also after a failure: trying again for every slab would help nobody.
        self._left = {(record.holding.token, kind): self.credit for record in known for kind in Kind}
