"""`tmemfs warm`: read files through a mount, and count how much of them stays in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tmem import PAGE_SIZE
from tmemcommon.sizes import ConfigError
from tmemfs.lifecycle.controlclient import ask
from tmemfs.lifecycle.controlsocket import MAX_REQUEST
from tmemfs.lifecycle.remotemount import RemoteMount

_CHUNK_BYTES = 1 << 20
_NAMES_BYTES = MAX_REQUEST // 2


def regular_files(mount: RemoteMount, paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the regular files at and below paths, which are relative to the mount. Symbolic links are not followed."""
    for path in paths:
        full = mount.mountpoint / path
        if full.is_dir():
            for directory, _, names in os.walk(full):
                found = (Path(directory) / name for name in sorted(names))
                yield from (file for file in found if file.is_file() and not file.is_symlink())
        elif full.is_file():
            yield full
        else:
            raise ConfigError(f"there is no file or directory '{full}': check its name")


def read_all(files: Sequence[Path], advance: Callable[[int], None]) -> None:
    """Read files; call `advance` with the bytes of each read.

    Each file is read from its end. Read from its start, it would be a first sequential scan, whose pages the pool may
    not get.
    """
    buffer = bytearray(_CHUNK_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            for start in reversed(range(0, path.stat().st_size, _CHUNK_BYTES)):
                advance(os.preadv(file.fileno(), [buffer], start))


def held_bytes(mount: RemoteMount, files: Sequence[Path]) -> int:
    """Return how much of files is in cache and pool, in whole pages. One request names as many files as fit."""
    pages, names = 0, b""
    for path in [*files, None]:
        name = os.fsencode(path.relative_to(mount.mountpoint)) + b"\0" if path is not None else b""
        if names and (path is None or len(names) + len(name) > _NAMES_BYTES):
            pages += int(ask(mount.entry, "held_pages", names))
            names = b""
        names += name
    return pages * PAGE_SIZE
