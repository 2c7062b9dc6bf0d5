"""The virtual files of a mount: /stats and the directory /.tmemfs/. The control socket uses them by name, too.

The content of a file is computed at its open, so all reads see one consistent snapshot. The files can be looked up but
are not listed, so a copy or a diff of the mount equals the backing. The control socket reads and writes the same files
through `call`. It also has queries, which take a text and return an answer.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from tmemfs.fuse.virtualfiles import InvalidInput, OpenVirtual
from tmemfs.stats import Stats, Value, as_prometheus, as_text

CONTROL_NUMBERS = 1 << 56  # the node numbers of virtual files start here
ROOT_NUMBER = 1
ROOT_STATS = b"stats"

Read = Callable[[], bytes]
Write = Callable[[bytes], Awaitable[None]]
Query = Callable[[bytes], Awaitable[bytes]]


class RandomAccess(Protocol):
    """A file of fixed size that is read and written at any offset."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def opened(self) -> None:
        """Count an open."""

    def closed(self) -> None:
        """Count a close."""

    async def read(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer only at the end."""

    async def write(self, offset: int, data: bytes) -> int:
        """Write bytes and return how many."""


class Node:
    """A virtual node. The base class serves as the directory, which has no content."""

    size = 0  # as in /proc: the content is computed at the open

    def __init__(self, number: int, name: bytes, mode: int) -> None:
        self.number = number
        self.name = name
        self.mode = mode
        self._created_ns = time.time_ns()

    def stat(self) -> os.stat_result:
        """Return the attributes. The owner is the user that mounted."""
        seconds = self._created_ns // 1_000_000_000
        fields = (self.mode, self.number, 0, 1, os.geteuid(), os.getegid(), self.size, seconds, seconds, seconds)
        times = dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), self._created_ns)
        return os.stat_result(fields, times | {"st_blksize": 4096, "st_blocks": 0, "st_rdev": 0})

    def open(self, flags: int) -> OpenVirtual:
        """Raise PermissionError: a directory is not opened as a file."""
        raise PermissionError(errno.EACCES, "")

    def truncate(self, size: int) -> None:
        """Accept any size, for `echo 16M > cache_size`."""


class SnapshotNode(Node):
    """A file whose content is the result of `read` at its open. Each write is passed to `write`."""

    def __init__(self, number: int, name: bytes, read: Read | None, write: Write | None, readers: int) -> None:
        super().__init__(number, name, stat.S_IFREG | (readers if read else 0) | (0o200 if write else 0))
        self.read = read
        self.write = write

    def open(self, flags: int) -> OpenVirtual:
        """Open the file. Raise PermissionError if it cannot be read or written as `flags` ask for."""
        reads, writes = flags & os.O_ACCMODE != os.O_WRONLY, flags & os.O_ACCMODE != os.O_RDONLY
        if (writes and self.write is None) or (reads and self.read is None):
            raise PermissionError(errno.EACCES, "")
        return _OpenSnapshot(self, self.read() if reads and self.read else b"")


class _OpenSnapshot:
    __slots__ = ("_data", "_node", "name")

    def __init__(self, node: SnapshotNode, data: bytes) -> None:
        self.name = node.name
        self._node = node
        self._data = data

    async def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        assert self._node.write is not None  # the open has checked it
        await self._node.write(data)
        return len(data)

    def close(self) -> None:
        pass


class RandomAccessNode(Node):
    """A file that only its owner may open, read and written at any offset."""

    def __init__(self, number: int, name: bytes, file: RandomAccess) -> None:
        super().__init__(number, name, stat.S_IFREG | 0o600)
        self._file = file

    @property
    def size(self) -> int:  # type: ignore[override]
        """The fixed size in bytes."""
        return self._file.size

    def open(self, flags: int) -> OpenVirtual:
        """Open the file. Raise PermissionError for O_TRUNC."""
        if flags & os.O_TRUNC:
            raise PermissionError(errno.EPERM, "")
        self._file.opened()
        return _OpenRandomAccess(self.name, self._file)

    def truncate(self, size: int) -> None:
        """Raise PermissionError unless `size` is the present size."""
        if size != self._file.size:
            raise PermissionError(errno.EPERM, "")


class _OpenRandomAccess:
    __slots__ = ("close", "name", "read", "write")

    def __init__(self, name: bytes, file: RandomAccess) -> None:
        self.name = name
        self.read = file.read
        self.write = file.write
        self.close = file.closed


class ControlFiles:
    """The virtual files of one guest."""

    def __init__(self, name: str, stats: Stats, config: Callable[[], Mapping[str, Value]]) -> None:
        self._name = os.fsencode(name)
        self._stats = stats
        self.directory = Node(CONTROL_NUMBERS, self._name, stat.S_IFDIR | 0o555)
        self._nodes: dict[int, Node] = {self.directory.number: self.directory}
        self._by_name: dict[bytes, Node] = {}
        self._queries: dict[bytes, Query] = {}
        self.root_stats = self._add_snapshot(ROOT_STATS, read=self._text)
        del self._by_name[ROOT_STATS]  # the control directory has its own `stats`
        self._add_snapshot(b"stats", read=self._text, write=self._reset)
        self._add_snapshot(b"stats.json", read=lambda: json.dumps(stats.snapshot(), indent=1).encode() + b"\n")
        self._add_snapshot(b"metrics", read=lambda: as_prometheus(stats.snapshot(), stats.counter_names()).encode())
        self._add_snapshot(b"config", read=lambda: as_text(config()).encode(errors="surrogateescape"))

    def _add(self, node: Node) -> None:
        self._nodes[node.number] = self._by_name[node.name] = node

    def _next_number(self) -> int:
        return CONTROL_NUMBERS + len(self._nodes)

    def _add_snapshot(
        self, name: bytes, read: Read | None = None, write: Write | None = None, readers: int = 0o444
    ) -> Node:
        node = SnapshotNode(self._next_number(), name, read, write, readers)
        self._add(node)
        return node

    def add_control(self, name: str, read: Callable[[], str] | None, write: Write, *, private: bool = False) -> None:
        """Add a file. `write` gets each written line and raises InvalidInput if it does not accept it.

        `read` returns the content without the last newline. `private`: only the owner may read the file.
        """
        readers = 0o400 if private else 0o444
        self._add_snapshot(name.encode(), (lambda: read().encode() + b"\n") if read else None, write, readers)

    def add_query(self, name: str, answer: Query) -> None:
        """Add a query for `call`. `answer` gets the text and raises InvalidInput if it does not accept it."""
        self._queries[name.encode()] = answer

    def add_file(self, name: str, file: RandomAccess) -> int:
        """Add a file that only its owner may open, read and written at any offset. Return its node number."""
        node = RandomAccessNode(self._next_number(), name.encode(), file)
        self._add(node)
        return node.number

    async def call(self, name: bytes, data: bytes | None) -> bytes:
        """Read a file by name (`data` is None), write to it, or ask a query. Raise InvalidInput, and their errors."""
        query, node = self._queries.get(name), self._by_name.get(name)
        if query is not None and data is not None:
            return await query(data)
        if isinstance(node, SnapshotNode):
            if data is None and node.read is not None:
                return node.read()
            if data is not None and node.write is not None:
                await node.write(data)
                return b""
        raise InvalidInput(f"there is nothing called '{os.fsdecode(name)}' to {'write' if data else 'read'}")

    def _text(self) -> bytes:
        return as_text(self._stats.snapshot()).encode()

    async def _reset(self, data: bytes) -> None:
        if data.strip() != b"reset":
            raise InvalidInput("the word to write is: reset")
        self._stats.reset()

    def find(self, parent: int, name: bytes) -> Node | None:
        """Return the virtual node of a name in a directory. Does not find `root_stats`."""
        if parent == self.directory.number:
            return self._by_name.get(name)
        return self.directory if parent == ROOT_NUMBER and name == self._name else None

    def get(self, number: int) -> Node | None:
        """Return the virtual node with a number."""
        return self._nodes.get(number)
