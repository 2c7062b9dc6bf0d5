"""The interface of virtual files for the request handlers. `tmemfs/virtual/` implements it."""

from __future__ import annotations

import os
from typing import Protocol


class InvalidInput(Exception):
    """A virtual file does not accept what was written to it. The message says what it accepts."""


class OpenVirtual(Protocol):
    """One open of a virtual file."""

    @property
    def name(self) -> bytes:
        """The name of the file."""

    async def read(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer only at the end."""

    async def write(self, offset: int, data: bytes) -> int:
        """Accept bytes and return how many. Raise InvalidInput."""

    def close(self) -> None:
        """End the open."""


class VirtualNode(Protocol):
    """A virtual file, or the directory of the virtual files."""

    @property
    def number(self) -> int:
        """The node number."""

    @property
    def name(self) -> bytes:
        """The name in its directory."""

    def stat(self) -> os.stat_result:
        """Return the attributes."""

    def open(self, flags: int) -> OpenVirtual:
        """Open the file with the flags of open(2). Raise PermissionError."""

    def truncate(self, size: int) -> None:
        """Set the size. Raise PermissionError where it is fixed."""


class VirtualFiles(Protocol):
    """All virtual nodes of a mount."""

    @property
    def directory(self) -> VirtualNode:
        """The control directory."""

    @property
    def root_stats(self) -> VirtualNode:
        """The file `stats` in the root of the mount. A file of this name in the backing takes precedence."""

    def find(self, parent: int, name: bytes) -> VirtualNode | None:
        """Return the node of a name in a directory. Does not find `root_stats`."""

    def get(self, number: int) -> VirtualNode | None:
        """Return the node with a number."""
