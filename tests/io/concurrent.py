"""Requests that run at the same time, and their answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.guestparts import Parts
from tmemfs.cache.pagecache import PAGE_SIZE
from tmemfs.io.files import OpenFile


class Asked:
    """Start requests and collect their answers."""

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
async def asking(parts: Parts) -> AsyncIterator[Asked]:
    """Give requests that run at the same time; the block ends when all are answered."""
    async with trio.open_nursery() as nursery:
        yield Asked(parts, nursery)


def pages_from(data: bytes | bytearray, first: int, count: int = 1) -> bytes:
    return bytes(data[first * PAGE_SIZE : (first + count) * PAGE_SIZE])


def random_stream(file: OpenFile) -> None:
    """Have nothing read ahead for an open file."""
    file.stream.next_page, file.stream.max_pages = 1 << 40, 0
