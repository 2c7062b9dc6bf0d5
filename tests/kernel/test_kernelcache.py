"""Pages are never invalidated after the reply to an open."""

from __future__ import annotations

import threading

import pyfuse3
import pytest
import trio

from tmemfs.backing import Backing
from tmemfs.kernel.kernelcache import KernelCache


class Invalidations:
    """The kernel's side: each call records its inode and waits for its release."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.go_on = threading.Semaphore(0)
        monkeypatch.setattr(pyfuse3, "invalidate_inode", self._invalidate)

    def _invalidate(self, number: int) -> None:
        self.begun.append(number)
        assert self.go_on.acquire(timeout=30)
        self.ended.append(number)


async def until(begun: list[int], numbers: list[int]) -> None:
    with trio.fail_after(30):
        while sorted(begun) != numbers:
            await trio.sleep(0.001)


def test_pages_are_invalidated_in_a_thread_and_an_open_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_side = Invalidations(monkeypatch)
    kernel = KernelCache(Backing(None, local=True, drop=False))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.run)
            kernel.invalidate_pages(7)
            await until(kernel_side.begun, [7])
            await kernel.finish_invalidations(8)  # an open of another inode does not wait
            nursery.start_soon(opened, 7)
            await trio.sleep(0.01)
            kernel_side.go_on.release()
            await until(opens, [7])
            nursery.cancel_scope.cancel()

    opens: list[int] = []

    async def opened(number: int) -> None:
        await kernel.finish_invalidations(number)
        assert kernel_side.ended == [number]
        opens.append(number)

    trio.run(main)


def test_pages_of_a_reopened_file_need_not_be_invalidated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_side = Invalidations(monkeypatch)
    kernel = KernelCache(Backing(None, local=True, drop=False))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in (1, 2, 3):
                kernel.invalidate_pages(number)
            await kernel.finish_invalidations(2)
            nursery.start_soon(kernel.run)
            for _ in range(2):
                kernel_side.go_on.release()
            await until(kernel_side.ended, [1, 3])
            nursery.cancel_scope.cancel()

    trio.run(main)
