"""Show and change a running guest: virtual files, /stats and the directory /.tmemfs/, and the same by name.

A file's content is made when it is opened, so one read is one consistent snapshot. The files are found by name and
never listed, so that a copy or a diff of the mount equals the backing. `call` is what the control socket asks: it reads
and writes the same files, and has queries besides, which take a text and give an answer.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tmemfs.stats import Stats, Value, as_prometheus, as_text

CONTROL_NUMBERS = 1 << 56  # node numbers from here on are ours
ROOT_STATS = b"stats"

Write = Callable[[bytes], Awaitable[None]]
Query = Callable[[bytes], Awaitable[bytes]]


class RandomAccess(Protocol):
    """A virtual file of fixed size that is read and written at any offset, and not made when it is opened."""

    size: int

    def opened(self) -> None:
        """Count an open."""

    def closed(self) -> None:
        """Count a close."""

    async def read(self, offset: int, size: int) -> bytes:
        """Read bytes; fewer only at the end."""

    async def write(self, offset: int, data: bytes) -> int:
        """Write bytes and give how many."""


@dataclass(frozen=True, slots=True)
class Node:
    """A virtual file, or the directory."""

    number: int
    name: bytes
    mode: int
    read: Callable[[], bytes] | None = None
    write: Write | None = None
    file: RandomAccess | None = None


class BadControlInput(Exception):
    """What was written to a control file means nothing to it."""


class Control:
    """The virtual files of one guest."""

    def __init__(self, name: str, stats: Stats, config: Callable[[], Mapping[str, Value]]) -> None:
        self._name = os.fsencode(name)
        self._stats = stats
        self._made = time.time_ns()
        self.directory = Node(CONTROL_NUMBERS, self._name, stat.S_IFDIR | 0o555)
        self._nodes: dict[int, Node] = {self.directory.number: self.directory}
        self._by_name: dict[bytes, Node] = {}
        self._queries: dict[bytes, Query] = {}
        self.root_stats = self._add(ROOT_STATS, read=self._text)
        del self._by_name[ROOT_STATS]
        self._add(b"stats", read=self._text, write=self._reset)
        self._add(b"stats.json", read=lambda: json.dumps(stats.snapshot(), indent=1).encode() + b"\n")
        self._add(b"metrics", read=lambda: as_prometheus(stats.snapshot(), stats.counter_names()).encode())
        self._add(b"config", read=lambda: as_text(config()).encode(errors="surrogateescape"))

    def _add(
        self, name: bytes, read: Callable[[], bytes] | None = None, write: Write | None = None, readers: int = 0o444
    ) -> Node:
        mode = stat.S_IFREG | (readers if read else 0) | (0o200 if write else 0)
        node = Node(CONTROL_NUMBERS + len(self._nodes), name, mode, read, write)
        self._nodes[node.number] = self._by_name[name] = node
        return node

    def add_switch(self, name: str, read: Callable[[], str] | None, write: Write, *, private: bool = False) -> None:
        """Add a file that takes a line and may show some. `write` raises BadControlInput for what it does not take.

        `private`: its owner alone may read it.
        """
        readers = 0o400 if private else 0o444
        self._add(name.encode(), (lambda: read().encode() + b"\n") if read else None, write, readers)

    def add_query(self, name: str, answer: Query) -> None:
        """Add a name that only `call` knows. `answer` raises BadControlInput for what it does not take."""
        self._queries[name.encode()] = answer

    async def call(self, name: bytes, data: bytes | None) -> bytes:
        """Read the file of a name, write `data` to it, or put a query. Raises BadControlInput, and what they raise."""
        query, node = self._queries.get(name), self._by_name.get(name)
        if query is not None and data is not None:
            return await query(data)
        if data is None and node is not None and node.read is not None:
            return node.read()
        if data is not None and node is not None and node.write is not None:
            await node.write(data)
            return b""
        raise BadControlInput(f"there is nothing called '{os.fsdecode(name)}' to {'write' if data else 'read'}")

    def add_file(self, name: str, file: RandomAccess) -> Node:
        """Add a file for its owner alone that is read and written at any offset."""
        node = Node(CONTROL_NUMBERS + len(self._nodes), name.encode(), stat.S_IFREG | 0o600, file=file)
        self._nodes[node.number] = self._by_name[node.name] = node
        return node

    def _text(self) -> bytes:
        return as_text(self._stats.snapshot()).encode()

    async def _reset(self, data: bytes) -> None:
        if data.strip() != b"reset":
            raise BadControlInput("the word to write is: reset")
        self._stats.reset()

    def find(self, parent: int, name: bytes) -> Node | None:
        """Return the virtual node of a name, except the one that gives way to an entry of the backing."""
        if parent == self.directory.number:
            return self._by_name.get(name)
        return self.directory if parent == 1 and name == self._name else None

    def get(self, number: int) -> Node | None:
        """Return the virtual node with a number."""
        return self._nodes.get(number)

    def attributes(self, node: Node) -> os.stat_result:
        """Return the node's stat: owned by who mounted; of size 0, as in /proc, if it is made when it is opened."""
        seconds = self._made // 1_000_000_000
        size = node.file.size if node.file is not None else 0
        fields = (node.mode, node.number, 0, 1, os.geteuid(), os.getegid(), size, seconds, seconds, seconds)
        times = dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), self._made)
        return os.stat_result(fields, times | {"st_blksize": 4096, "st_blocks": 0, "st_rdev": 0})
