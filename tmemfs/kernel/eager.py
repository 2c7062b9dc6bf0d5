"""Let pyfuse3 read the next request without two trips through the scheduler, when one is waiting already.

pyfuse3 takes a lock, waits until /dev/fuse is readable, and reads: in trio each of the two is at least one turn of the
scheduler and together two epoll_wait and one epoll_ctl. Without them a 4-KiB hit takes 30 instead of 85 µs of
processor time (four readers, `python -m bench.hits` before and after). Where a request is waiting already, a poll(2)
of 1 µs says so, and the task that has just replied goes on with it. After BURST of those the others get their turn:
fills, the drain, timers.

pyfuse3 looks its scheduler up in its module variable `trio`, which its own asyncio mode replaces; so does this.
"""

from __future__ import annotations

import select
from types import SimpleNamespace

import pyfuse3
import trio
from trio.lowlevel import ParkingLot

BURST = 16


class EagerLock:
    """A lock that is taken without a turn of the scheduler when it is free, even past those who wait for it."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(self, *exc: object) -> None:
        self._held = False
        self._waiting.unpark()


class EagerReads:
    """Wait for requests, eagerly."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fd = -1
        self._burst = 0

    async def wait_readable(self, fd: int) -> None:
        """Return when the descriptor can be read: at once if it can be now."""
        if fd != self._fd:
            self._fd = fd
            self._poll.register(fd, select.POLLIN)
        if self._poll.poll(0):
            self._burst += 1
            if self._burst < BURST:
                return
        self._burst = 0
        await trio.lowlevel.wait_readable(fd)


def install() -> None:
    """Make pyfuse3 use these; to be called before `pyfuse3.main`."""
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        Lock=EagerLock,
        ClosedResourceError=trio.ClosedResourceError,
        open_nursery=trio.open_nursery,
        lowlevel=SimpleNamespace(
            wait_readable=EagerReads().wait_readable,
            current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
            notify_closing=trio.lowlevel.notify_closing,
        ),
    )
