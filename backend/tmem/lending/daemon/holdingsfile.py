"""The holdings file: what each guest holds at most, so that the next tmemd does not lend this memory to others.

The file must be right whenever tmemd is killed, but is not written for every lend: it has a credit for each guest on
top of what it holds, and is written again before slabs are populated that the credit does not cover. It is replaced
atomically and not synced, because guests do not survive a crash of the machine either.
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
    """What one guest holds at most, in slabs, and its process."""

    holding: Holding
    started: int  # start time of the process, because pids are reused

    @classmethod
    def of(cls, holding: Holding, process: Process, credit: int) -> Record:
        """Add `credit` slabs of each kind to what is held, within the limits. An evicted guest gets none."""
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
        """Return the entry of the file, a flat object with all fields."""
        fields: dict[str, Any] = msgspec.to_builtins(self.holding)
        return {"started": self.started, **fields.pop("settings"), **fields}

    @classmethod
    def parse(cls, flat: dict[str, Any]) -> Record:
        """Parse an entry of the file. Raise msgspec.ValidationError if it is malformed."""
        return msgspec.convert({"holding": {**flat, "settings": flat}, "started": flat.get("started")}, cls)


class HoldingsFile:
    """Keeps the file ahead of what is held. `credit` is in slabs, for each guest and kind."""

    def __init__(self, path: Path, credit: int) -> None:
        self._path = path
        self.credit = credit
        self._credit_left: dict[tuple[bytes, Kind], int] = {}
        self.writes = self.failures = 0

    def load(self) -> list[Record]:
        """Return the records of an earlier tmemd; none if there is no file, or if it cannot be trusted or parsed."""
        try:
            return [Record.parse(flat) for flat in msgspec.json.decode(self._read(), type=list[dict[str, Any]])]
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("what older guests hold is not known: %s cannot be read: %s", self._path, error)
        return []

    def _read(self) -> bytes:
        """Read the file. Beside a socket in /tmp, it may be another user's, a FIFO or a symbolic link."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it is not a regular file of this user")
            return file.read()

    def cover(self, token: bytes, kind: Kind, slabs: int, records: Callable[[], Iterable[Record]]) -> None:
        """Spend a guest's credit for `slabs` more; if it is too small, write the file with what `records` returns."""
        left = self._credit_left.get((token, kind), 0) - slabs
        if left < 0:
            self.write(records())
        else:
            self._credit_left[token, kind] = left

    def write(self, records: Iterable[Record]) -> None:
        """Replace the file. A failure is logged once and counted."""
        written = list(records)
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.encode([record.flat() for record in written]))
            fresh.rename(self._path)
            self.writes += 1
        except OSError as error:
            if not self.failures:
                log.warning("the next tmemd will not know what guests hold: %s: %s", self._path, error)
            self.failures += 1
        # After a failure as well: retrying for every slab would not help.
        self._credit_left = {(record.holding.token, kind): self.credit for record in written for kind in Kind}
