"""Requests that run concurrently, and a file for them without read-ahead."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.guestparts import Parts
from tests.pagebytes import pages_of
from tmem.arena import PAGE_SIZE
from tmemfs.io.files import OpenFile


class Requests:
    """Start requests as tasks, and collect their answers by name."""

    def __init__(self, parts: Parts, nursery: trio.Nursery) -> None:
        self.parts = parts
        self.nursery = nursery
        self.answers: dict[str, bytes | OSError] = {}

    def read(self, name: str, file: OpenFile, offset: int, size: int) -> None:
        async def run() -> None:
            try:
                self.answers[name] = await self.parts.read(file, offset, size)
            except OSError as error:
                self.answers[name] = error

        self.nursery.start_soon(run)

    def write(self, name: str, file: OpenFile, offset: int, data: bytes) -> None:
        async def run() -> None:
            await self.parts.writer.write(file, offset, data)
            self.answers[name] = data

        self.nursery.start_soon(run)


@asynccontextmanager
async def concurrent_requests(parts: Parts) -> AsyncIterator[Requests]:
    """Yield a place to start requests; the block ends when all are answered."""
    async with trio.open_nursery() as nursery:
        yield Requests(parts, nursery)


def pages_from(data: bytes | bytearray, first: int, count: int = 1) -> bytes:
    """Return some of the pages that `data` consists of."""
    return bytes(data[first * PAGE_SIZE : (first + count) * PAGE_SIZE])


def unstreamed_file(parts: Parts, pages: int) -> tuple[OpenFile, bytearray]:
    """Return a file of so many pages without read-ahead, and its content."""
    data = bytearray(pages_of(1, pages))
    file = parts.make("f", bytes(data))
    file.stream.max_pages = 0
    return file, data
