"""Mounts that borrow from one tmemd, and readers that compare every byte."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Place, wait_until
from tests.lending.tmemd import Tmemd
from tests.mounted import Mounted
from tests.pagebytes import pages_of

MIB = 1 << 20
PAGE = 4096
SLAB = 65536
PAUSE = 0.005  # seconds between rounds of a reader: the mounts, the tmemd and the test have two processors


class Borrowing:
    """One mount with a file `f` of known content, which borrows its pool."""

    def __init__(self, directory: Path, tmemd: Tmemd, mib: int) -> None:
        directory.mkdir()
        self.place = Place(directory)
        self.mounted = Mounted(self.place)
        self.data = pages_of(sum(directory.name.encode()), mib * 256)
        (self.place.source / "f").write_bytes(self.data)
        self._swapped = b""
        self._tmemd = tmemd
        self._path = self.place.mountpoint / "f"

    def start(self, *options: str) -> None:
        """Mount with a cache of 1 MiB. The arena is small: a tmemd that checks itself looks at every slab of it."""
        self.mounted.start("--pool", f"unix:{self._tmemd.socket}", "--pool-max", "64M", *options)

    def start_with_hswap(self, mib: int) -> None:
        """Mount with a swap-like file, and write all of it."""
        overflow = self.place.source.parent / "overflow"
        self.start("--hswap", f"{mib}M", "--hswap-overflow", os.fspath(overflow))
        self._swapped = pages_of(77, mib * 256)
        with open(self.place.mountpoint / ".tmemfs" / "hswap", "r+b", buffering=0) as file:
            for offset in range(0, len(self._swapped), 64 * PAGE):
                os.pwrite(file.fileno(), self._swapped[offset : offset + 64 * PAGE], offset)

    def read_hswap(self) -> None:
        """Compare the swap-like file with what was written."""
        with open(self.place.mountpoint / ".tmemfs" / "hswap", "rb", buffering=0) as file:
            for offset in range(0, len(self._swapped), 64 * PAGE):
                piece = os.pread(file.fileno(), 64 * PAGE, offset)
                assert piece == self._swapped[offset : offset + 64 * PAGE], f"hswap at {offset}"

    @property
    def pid(self) -> int:
        """The process of the mount."""
        assert self.mounted.process is not None
        return self.mounted.process.pid

    def stats(self) -> dict[str, Any]:
        """Read the counters."""
        return self.mounted.stats()

    def read(self, seed: int = 0, requests: int | None = None) -> None:
        """Read and compare pieces of the file in random order: all of it once, or so many."""
        choose = random.Random(seed)
        pieces = list(range(0, len(self.data), 4 * PAGE))
        choose.shuffle(pieces)
        with open(self._path, "rb", buffering=0) as file:
            for offset in pieces[:requests]:
                assert os.pread(file.fileno(), 4 * PAGE, offset) == self.data[offset : offset + 4 * PAGE]

    def read_until(self, condition: Callable[[], object], what: str) -> None:
        """Read the whole file repeatedly until a condition is true."""

        def read_more() -> object:
            self.read()
            return condition()

        wait_until(read_more, what)

    def row(self) -> dict[str, Any]:
        """Return tmemd's row of the mount."""
        (row,) = [row for row in self._tmemd.rows() if row["name"] == os.fspath(self.place.mountpoint)]
        return row

    def agrees(self) -> bool:
        """Return whether tmemd's ledger and the mount agree on what it holds."""
        row, held = self.row(), self.stats()["lender_held_bytes"]
        return bool(row["state"] == "connected" and row["ephemeral_bytes"] + row["persistent_bytes"] == held)

    def wait_agreed(self) -> None:
        """Wait until ledger and mount agree."""
        wait_until(self.agrees, "ledger and guest agree")

    def wait_connected(self) -> None:
        """Wait until the mount is connected to tmemd."""
        wait_until(lambda: self.stats()["lender"] == "connected", "the mount has found tmemd again")

    def end(self) -> None:
        """Unmount; the guest checks its consistency."""
        self.mounted.end()

    def clean(self) -> None:
        """Stop the watchdog and remove the files."""
        self.mounted.stop_watchdog()
        self.place.clean()


class Load:
    """Reads and compares in a thread for each guest, until the end of the with block."""

    def __init__(self, *guests: Borrowing) -> None:
        self._guests = guests
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._rounds = [0] * len(guests)
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(len(guests))]

    def _run(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                self._guests[number].read(seed=self._rounds[number], requests=16)
                self._rounds[number] += 1
                self._stop.wait(PAUSE)
        except BaseException as error:
            self._errors.append(error)

    def go_on(self, rounds: int = 4) -> None:
        """Wait until every reader has done `rounds` more rounds."""
        goals = [done + rounds for done in self._rounds]
        wait_until(
            lambda: self._errors or all(done >= goal for done, goal in zip(self._rounds, goals, strict=True)),
            "the readers make progress",
        )
        assert not self._errors, self._errors

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if exception[0] is None:
            assert not self._errors, self._errors
