"""Things that keep 4-KiB pages, all with the same two verbs, for benches to compare.

Each is a context manager that gives a Store and takes away what it started. BenchError says what is missing.
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

import lz4.block

from bench.tools import procmem
from bench.tools.children import BenchError, end, start, undisturbed
from bench.tools.content import PAGE_SIZE
from tmem import EmbeddedArena, Tmem

_START_SECONDS = 15.0
_ZRAM = Path("/sys/class/zram-control")


class Store(Protocol):
    """Keep pages by number."""

    def put(self, number: int, page: bytes) -> None:
        """Keep a page."""

    def get(self, number: int) -> bytes:
        """Give a page back."""

    def memory(self) -> int:
        """Tell the bytes that everything kept takes, with what describes it."""


class PoolStore:
    """The tmem pool, in this process."""

    def __init__(self, arena: EmbeddedArena) -> None:
        self.tmem = Tmem(arena)
        self.pool = self.tmem.new_pool(name="bench")

    def put(self, number: int, page: bytes) -> None:
        """Put; BenchError when the pool refuses."""
        if not self.pool.put(1, number, page):
            raise BenchError("the pool refused a page")

    def get(self, number: int) -> bytes:
        """Get, which removes the page."""
        page = self.pool.get(1, number)
        if page is None:
            raise BenchError(f"the pool lost page {number}")
        return page

    def memory(self) -> int:
        """Measure this process and its arena."""
        return procmem.of(os.getpid()).total


@contextlib.contextmanager
def tmem_pool(capacity: int) -> Iterator[PoolStore]:
    """Yield an embedded pool."""
    arena = EmbeddedArena(capacity)
    try:
        yield PoolStore(arena)
    finally:
        arena.close()


class Lz4Store:
    """The limit: compress and decompress, and keep the bytes in a list."""

    def __init__(self, pages: int) -> None:
        self._kept: list[bytes] = [b""] * pages

    def put(self, number: int, page: bytes) -> None:
        """Compress."""
        self._kept[number] = lz4.block.compress(page, store_size=False)

    def get(self, number: int) -> bytes:
        """Decompress."""
        page: bytes = lz4.block.decompress(self._kept[number], uncompressed_size=PAGE_SIZE)
        return page

    def memory(self) -> int:
        """Add up the compressed bytes alone."""
        return sum(map(len, self._kept))


class ZramStore:
    """A zram device with lz4, read and written past the kernel's page cache."""

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
        """Ask the device (its table of pages is not in this figure: 16 bytes a page of the disk's size)."""
        return int(self._state.read_text().split()[2])


@contextlib.contextmanager
def zram(pages: int) -> Iterator[ZramStore]:
    """Add a zram device, and remove it afterwards."""
    if os.geteuid() != 0 or not (_ZRAM / "hot_add").exists():
        raise BenchError("zram needs root and the kernel's zram module")
    number = int((_ZRAM / "hot_add").read_text())
    try:
        block = Path(f"/sys/block/zram{number}")
        (block / "comp_algorithm").write_text("lz4")
        (block / "disksize").write_text(str(pages * PAGE_SIZE))
        device = os.open(f"/dev/zram{number}", os.O_RDWR | os.O_DIRECT)
        try:
            yield ZramStore(device, number)
        finally:
            os.close(device)
    except OSError as error:
        raise BenchError(f"zram cannot be used here: {error}") from None
    finally:
        with undisturbed(), contextlib.suppress(OSError):
            _remove_zram(number)


def _remove_zram(number: int) -> None:
    """Remove a device; somebody (udev) may be looking at it for a moment."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            Path(f"/sys/block/zram{number}/reset").write_text("1")
            (_ZRAM / "hot_remove").write_text(str(number))
            return
        time.sleep(0.1)


class ServerStore:
    """A server on a Unix socket, one request at a time, as somebody who misses a page asks."""

    def __init__(self, client: Any, pid: int) -> None:
        self._client = client
        self._pid = pid

    def put(self, number: int, page: bytes) -> None:
        """Set a value."""
        self._client.set(b"%d" % number, page)

    def get(self, number: int) -> bytes:
        """Get a value."""
        page: bytes = self._client.get(b"%d" % number)
        return page

    def memory(self) -> int:
        """Measure the server's process."""
        return procmem.of(self._pid).total


@contextlib.contextmanager
def redis(space: Path) -> Iterator[ServerStore]:
    """Start a redis that saves nothing."""
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
    """Start a memcached that has room for everything."""
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
