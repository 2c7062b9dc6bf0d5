"""A running mount, as the commands see it: its control files, its process and its swap-like file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tmemcommon.sizes import ConfigError
from tmemfs.kernel.mounttable import is_tmemfs, resolve_mountpoint, top_mount
from tmemfs.lifecycle.controlclient import ANSWER_SECONDS, RemoteError, ask, connected
from tmemfs.lifecycle.controlsocket import peer

T = TypeVar("T")


class RemoteMount:
    """A mount that is served by another process."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        """Find the mount. Raises ConfigError if there is no tmemfs mount."""
        self.mountpoint = resolve_mountpoint(mountpoint)
        entry = top_mount(self.mountpoint)
        if entry is None or not is_tmemfs(entry):
            raise ConfigError(f"'{mountpoint}' is not a tmemfs mount: findmnt -t fuse.tmemfs lists them")
        self.entry = entry

    def read(self, name: str) -> bytes:
        """Read a control file. Raises RemoteError."""
        return ask(self.entry, name)

    def write(self, name: str, content: bytes, seconds: float = ANSWER_SECONDS) -> None:
        """Write a control file. Raises RemoteError, after at most `seconds`, and ConfigError for bad content."""
        ask(self.entry, name, content, seconds)

    def config(self) -> dict[str, str]:
        """Read the mount's configuration."""
        lines = os.fsdecode(self.read("config")).splitlines()
        return {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}

    def hswap_file(self, config: dict[str, str]) -> Path:
        """Return the path of the swap-like file, whether the mount has one or not."""
        return self.mountpoint / config.get("control_name", ".tmemfs") / "hswap"

    def relative(self, path: str) -> Path:
        """Return a path relative to the mount. It is given absolute or relative to the working directory."""
        absolute = _bounded(lambda: Path(os.path.realpath(path)), f"'{path}'")
        try:
            return absolute.relative_to(self.mountpoint)
        except ValueError:
            raise ConfigError(
                f"'{absolute}' is not below '{self.mountpoint}': relative paths start at the working directory"
            ) from None

    def open_process(self) -> tuple[int, int] | None:
        """Return pid and pidfd of the mount's process; None if it cannot be found."""
        try:
            with connected(self.entry) as connection:
                pid, _ = peer(connection)
                return pid, os.pidfd_open(pid)
        except (RemoteError, OSError):
            return None


def _bounded(call: Callable[[], T], what: str) -> T:
    """Call in a thread and wait a bounded time, because a call on a mount that hangs never returns."""
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
        raise RemoteError(f"{what} does not answer: the mount hangs; tmemfs umount --lazy removes it")
    result = results[0]
    if isinstance(result, OSError):
        raise RemoteError(f"{what}: {result.strerror}") from result
    return result
