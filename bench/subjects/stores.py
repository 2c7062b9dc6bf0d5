"""Stores of 4-KiB pages with the same two operations, for `bench.poolalone`.

Each is a context manager that starts a store and removes it afterwards. BenchError says what is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.tools import procmem
from bench.tools.children import BenchError, end, start
from bench.tools.content import PAGE_SIZE
from bench.tools.zram import zram_device
from tmem import EmbeddedArena, Tmem

_START_SECONDS = 15.0


class Store(Protocol):
    """A store of pages by number."""

    def put(self, number: int, page: bytes) -> None:
        """Store a page."""

    def get(self, number: int) -> bytes:
        """Return a page."""

    def memory(self) -> int:
        """Return the bytes that all pages and their metadata take."""


class PoolStore:
    """The tmem pool, in this process."""

    def __init__(self, arena: EmbeddedArena) -> None:
        self.tmem = Tmem(arena)
        self.pool = self.tmem.new_pool(name="bench")

    def put(self, number: int, page: bytes) -> None:
        """Put a page; BenchError when the pool refuses it."""
        if not self.pool.put(1, number, page):
            raise BenchError("the pool refused a page")

    def get(self, number: int) -> bytes:
        """Return a page and remove it."""
        page = self.pool.get(1, number)
        if page is None:
            raise BenchError(f"the pool lost page {number}")
        return page

    def memory(self) -> int:
        """Return the memory of this process and its arena."""
        return procmem.of(os.getpid()).total


@contextlib.contextmanager
def tmem_pool(capacity: int) -> Iterator[PoolStore]:
    """Yield an embedded pool."""
    arena = EmbeddedArena(capacity)
    try:
        yield PoolStore(arena)
    finally:
        arena.close()


class ZramStore:
    """A zram device with lz4, read and written with O_DIRECT."""

    def __init__(self, device: int, number: int) -> None:
        self._device = device
        self._state = Path(f"/sys/block/zram{number}/mm_stat")
        self._buffer = mmap.mmap(-1, PAGE_SIZE)  # aligned to a page, as O_DIRECT wants it

    def put(self, number: int, page: bytes) -> None:
        """Write a page."""
        self._buffer[:] = page
        os.pwrite(self._device, self._buffer, number * PAGE_SIZE)

    def get(self, number: int) -> bytes:
        """Read a page."""
        os.preadv(self._device, [self._buffer], number * PAGE_SIZE)
        return self._buffer[:]

    def memory(self) -> int:
        """Return what the device says; its table of pages (16 bytes a page of the disk's size) is not included."""
        return int(self._state.read_text().split()[2])


@contextlib.contextmanager
def zram(pages: int) -> Iterator[ZramStore]:
    """Yield a store on a new zram device."""
    with zram_device(pages * PAGE_SIZE) as number:
        device = os.open(f"/dev/zram{number}", os.O_RDWR | os.O_DIRECT)
        try:
            yield ZramStore(device, number)
        finally:
            os.close(device)


class ServerStore:
    """A server on a Unix socket, asked for one page at a time."""

    def __init__(self, client: Any, pid: int) -> None:
        self._client = client
        self._pid = pid

    def put(self, number: int, page: bytes) -> None:
        """Store a page."""
        self._client.set(b"%d" % number, page)

    def get(self, number: int) -> bytes:
        """Return a page."""
        page: bytes = self._client.get(b"%d" % number)
        return page

    def memory(self) -> int:
        """Return the memory of the server's process."""
        return procmem.of(self._pid).total


@contextlib.contextmanager
def redis(space: Path) -> Iterator[ServerStore]:
    """Start a redis without persistence."""
    socket = space / "redis.sock"
    command: list[str | Path] = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        socket,
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        space,
    ]
    with _served("redis-server", command, socket) as pid:
        client = importlib.import_module("redis").Redis(unix_socket_path=str(socket))
        try:
            yield ServerStore(client, pid)
        finally:
            client.close()


@contextlib.contextmanager
def memcached(space: Path, megabytes: int) -> Iterator[ServerStore]:
    """Start a memcached with `megabytes` of memory."""
    socket = space / "memcached.sock"
    command: list[str | Path] = ["memcached", "-s", socket, "-m", str(megabytes)]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with _served("memcached", command, socket) as pid:
        client = importlib.import_module("pymemcache.client.base").Client(
            str(socket), no_delay=False, default_noreply=False
        )
        try:
            yield ServerStore(client, pid)
        finally:
            client.close()


@contextlib.contextmanager
def _served(program: str, command: Sequence[str | Path], socket: Path) -> Iterator[int]:
    """Run a server until its socket is there; end it afterwards."""
    if shutil.which(program) is None:
        raise BenchError(f"{program} is missing: apt install it")
    child = start(command)
    try:
        limit = time.monotonic() + _START_SECONDS
        while not socket.exists():
            if child.poll() is not None or time.monotonic() > limit:
                raise BenchError(f"{program} did not start")
            time.sleep(0.02)
        yield child.pid
    finally:
        end(child)
