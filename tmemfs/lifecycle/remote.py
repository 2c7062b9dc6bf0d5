"""A running mount, seen from outside: what is asked of it, and how to wait for its end."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tmem.arena import PAGE_SIZE
from tmemcommon.commandline import say
from tmemfs.config import ConfigError
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import MountCopy, copies_of, filesystem_of, is_tmemfs, resolve_mountpoint, top_mount
from tmemfs.lifecycle import loopswap
from tmemfs.lifecycle.controlsocket import ANSWER_SECONDS, MAX_REQUEST, RemoteError, ask, connected, peer, remove_stale
from tmemfs.lifecycle.preflight import is_dead
from tmemfs.lifecycle.writingback import Unwritable, write_back
from tmemfs.virtual.writebackcontrol import NAME, ON

_RESERVE_SECONDS = 120.0  # a busy disk can take its time
_CHUNK_BYTES = 1 << 20
_NAMES_BYTES = MAX_REQUEST // 2
END_SECONDS = 600.0  # that umount waits: writing back to a slow directory takes its time
COPY_SECONDS = 5.0  # and for a copy of the mount elsewhere: a container runs for days
DISCARD_SECONDS = 5.0  # and for what may be given up
_FIRST_LOOK_SECONDS = 1.0
_LOOK_SECONDS = 5.0
_SHOWN_COPIES = 4
MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})

T = TypeVar("T")


class UnfinishedError(RemoteError):
    """Report that a mount was taken away, but its process has not ended in time."""

    exit_code = 3


class RemoteMount:
    """Be the outside of one mount."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        """Find a mount. Raises ConfigError if there is none of ours."""
        self.mountpoint = resolve_mountpoint(mountpoint)
        entry = top_mount(self.mountpoint)
        if entry is None or not is_tmemfs(entry):
            raise ConfigError(f"'{mountpoint}' is not a tmemfs mount: findmnt -t fuse.tmemfs lists those there are")
        self._entry = entry

    def read(self, name: str) -> bytes:
        """Read a control file. Raises RemoteError."""
        return ask(self._entry, name)

    def write(self, name: str, content: bytes, seconds: float = ANSWER_SECONDS) -> None:
        """Write a control file. Raises RemoteError, at the latest after `seconds`, and ConfigError for bad content."""
        ask(self._entry, name, content, seconds)

    def relative(self, path: str) -> Path:
        """Make a path relative to the mount: given as to any program, from the working directory or absolute."""
        absolute = _bounded(lambda: Path(os.path.realpath(path)), f"'{path}'")
        try:
            return absolute.relative_to(self.mountpoint)
        except ValueError:
            raise ConfigError(
                f"'{absolute}' is not below '{self.mountpoint}': paths are absolute, or from the working directory"
            ) from None

    def _process(self) -> tuple[int, int] | None:
        """Get hold of the process behind the mount: its pid and a pidfd; None if it cannot be found."""
        try:
            with connected(self._entry) as connection:
                pid, _ = peer(connection)
                return pid, os.pidfd_open(pid)
        except (RemoteError, OSError):
            return None

    def _config(self) -> dict[str, str]:
        """Ask for the mount's configuration."""
        lines = os.fsdecode(self.read("config")).splitlines()
        return {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}

    def _hswap(self, config: Mapping[str, str]) -> Path:
        """Say where the mount's swap-like file is, if it has one."""
        return self.mountpoint / config.get("control_name", ".tmemfs") / "hswap"

    def swap_on(self) -> Path:
        """Swap to the mount's hswap file; return the loop device. Raises ConfigError, or an error with nothing left."""
        lacking = loopswap.obstacle()
        if lacking is not None:
            raise ConfigError(lacking)
        config = self._config()
        if config.get("hswap_bytes", "0") == "0":
            raise ConfigError(f"'{self.mountpoint}' has no hswap file: mount it with --hswap SIZE")
        if config.get("memory_locked") != "1":
            raise ConfigError(f"the process behind '{self.mountpoint}' can be swapped out itself: mount it as root")
        overflow = Path(config["hswap_overflow"])
        kind = filesystem_of(overflow)
        if kind in MEMORY_FILESYSTEMS or kind.startswith("fuse"):  # or the process that serves it can
            raise ConfigError(f"overflow file '{overflow}' can be swapped out itself: give --hswap-overflow on a disk")
        hswap = self._hswap(config)
        if loopswap.swap_devices_of(hswap):
            raise RemoteError(f"'{self.mountpoint}' is swapped to already: tmemfs swapoff {self.mountpoint} ends that")
        self.write("hswap_reserve", b"1\n", _RESERVE_SECONDS)
        return loopswap.swap_on(hswap)

    def swap_off(self) -> None:
        """End swapping to the mount's hswap file and empty the file."""
        lacking = loopswap.obstacle()
        if lacking is not None:
            raise ConfigError(lacking)
        if not loopswap.swap_off(self._hswap(self._config())):
            raise RemoteError(f"'{self.mountpoint}' is not swapped to: swapon --show lists what is")
        self.write("hswap_clear", b"1\n")

    def umount(
        self, *, lazy: bool = False, timeout: float | None = None, unwritable: Unwritable = Unwritable.REFUSE
    ) -> bool:
        """Unmount and wait until the process behind the mount has ended.

        Returns False if that could not be waited for, because the mount did not name its process. Raises
        RemoteError if the mount is in use, UnwrittenError if it holds what cannot be written back, and UnfinishedError
        if the process has not ended in time: without a `timeout` END_SECONDS, or COPY_SECONDS while a copy of the
        mount stays that nothing here ends.
        """
        dead = is_dead(self.mountpoint)
        config = {} if dead else self._config_if_it_answers()
        if config and loopswap.swap_devices_of(self._hswap(config)):
            raise RemoteError(f"'{self.mountpoint}' is swapped to: run tmemfs swapoff {self.mountpoint} first")
        if dead:
            remove_stale(self._entry)
        process = None if dead else self._process()
        writes_back = config.get("writeback") == "1"
        if writes_back:
            seconds = DISCARD_SECONDS if unwritable is Unwritable.DISCARD else END_SECONDS
            write_back(self, unwritable, seconds if timeout is None else timeout)
        try:
            unmount(self.mountpoint, lazy=lazy or dead)
        except OSError as error:
            if writes_back:
                self.write(NAME, ON)
            if error.errno == errno.EBUSY:
                raise RemoteError(
                    f"'{self.mountpoint}' is in use: end what uses it (fuser -vm lists it), or give --lazy"
                ) from error
            raise RemoteError(f"'{self.mountpoint}' cannot be unmounted: {error.strerror}") from error
        if process is None:
            return dead
        pid, pidfd = process
        try:
            self._wait_for_end(pidfd, f"its process (pid {pid})", timeout)
        finally:
            os.close(pidfd)
        return True

    def _config_if_it_answers(self) -> dict[str, str]:
        """Ask for the configuration; nothing of a mount that does not answer: umount(2) sees whether it is in use."""
        try:
            return self._config()
        except RemoteError:
            return {}

    def _wait_for_end(self, pidfd: int, name: str, timeout: float | None) -> None:
        """Wait for the end of the process, and say what for when it takes long. Raises UnfinishedError."""
        began = time.monotonic()
        told = ""
        pause = _FIRST_LOOK_SECONDS
        while True:
            if select.select([pidfd], [], [], pause if timeout is None else min(pause, timeout))[0]:
                return
            copies = copies_of(self._entry)
            limit = timeout if timeout is not None else COPY_SECONDS if copies else END_SECONDS
            left = began + limit - time.monotonic()
            reason = f"it serves a copy in {_places_of(copies)}" if copies else "it writes back, or still has users"
            if left <= 0:
                raise UnfinishedError(
                    f"'{self.mountpoint}' is unmounted, but {name} has not ended after {limit:g} s: {reason}"
                )
            if reason != told:
                say(f"'{self.mountpoint}' is unmounted; waiting for the end of {name}: {reason}")
                told = reason
            pause = min(left, _LOOK_SECONDS)

    def warm(self, files: list[Path], advance: Callable[[int], None]) -> None:
        """Read files through the mount.

        `advance` is told the bytes as they come. A file is read from its end: read from its start it would be a stream
        that is seen for the first time, and the pages of such a one need not be put into the pool.
        """
        buffer = bytearray(_CHUNK_BYTES)
        for path in files:
            with open(path, "rb", buffering=0) as file:
                for start in reversed(range(0, path.stat().st_size, _CHUNK_BYTES)):
                    advance(os.preadv(file.fileno(), [buffer], start))

    def held_bytes(self, files: list[Path]) -> int:
        """Ask how much of files is in memory, in whole pages, for as many files at once as a request has room for."""
        pages, names = 0, b""
        for path in [*files, None]:
            name = os.fsencode(path.relative_to(self.mountpoint)) + b"\0" if path is not None else b""
            if names and (path is None or len(names) + len(name) > _NAMES_BYTES):
                pages += int(ask(self._entry, "held_pages", names))
                names = b""
            names += name
        return pages * PAGE_SIZE

    def files(self, paths: list[Path]) -> Iterator[Path]:
        """Walk over the regular files at and below paths, without following links."""
        for path in paths:
            full = self.mountpoint / path
            if full.is_dir():
                for directory, _, names in os.walk(full):
                    found = (Path(directory) / name for name in sorted(names))
                    yield from (file for file in found if file.is_file() and not file.is_symlink())
            elif full.is_file():
                yield full
            else:
                raise ConfigError(f"there is no file or directory '{full}': check its name")


def _places_of(copies: list[MountCopy]) -> str:
    """Say where copies of a mount are, and how each is taken away."""
    places = [
        f"'{copy.mountpoint}' (tmemfs umount {copy.mountpoint})"
        if copy.pid == os.getpid()
        else f"the mount namespace of pid {copy.pid} ({copy.command}), there at '{copy.mountpoint}' "
        f"(end it, or nsenter --mount --target {copy.pid} umount {copy.mountpoint})"
        for copy in copies[:_SHOWN_COPIES]
    ]
    more = len(copies) - len(places)
    return ", ".join(places) + (f" and {more} more" if more else "")


def _bounded(call: Callable[[], T], what: str) -> T:
    """Touch a file of the mount from a thread, because a mount that hangs hangs whoever touches it."""
    results: list[T | OSError] = []

    def run() -> None:
        try:
            results.append(call())
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not results:
        raise RemoteError(f"{what} does not answer: the mount hangs; tmemfs umount --lazy takes it away")
    result = results[0]
    if isinstance(result, OSError):
        raise RemoteError(f"{what}: {result.strerror}") from result
    return result
