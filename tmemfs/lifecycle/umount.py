"""`tmemfs umount`: write everything back, unmount, and wait until the mount's process has ended.

With --writeback, write-back is turned off first. Writes then go through, so once nothing is dirty nothing can be lost
any more. A write-back that failed after the unmount could not be reported to the caller.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import time

from tmemcommon.commandline import CommandError, say
from tmemcommon.mountinfo import MountEntry
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import MountCopy, copies_of
from tmemfs.lifecycle.controlclient import RemoteError, remove_stale
from tmemfs.lifecycle.loopswap import swap_devices_of
from tmemfs.lifecycle.preflight import is_dead
from tmemfs.lifecycle.remotemount import RemoteMount
from tmemfs.virtual.writebackcontrol import GIVE_UP, NAME, OFF, ON, Unwritten, parse

END_SECONDS = 600.0  # write-back to a slow directory takes long
COPY_SECONDS = 5.0  # while a copy of the mount is elsewhere: a container may run for days
DISCARD_SECONDS = 5.0  # for a write-back that may be given up
_POLL_SECONDS = 0.1  # between two looks at the write-back
_RETRY_SECONDS = 1.0  # between two tries of a write-back that failed
_FIRST_MESSAGE_SECONDS = 1.0  # a shorter wait is not reported
_NEXT_MESSAGE_SECONDS = 5.0
_FIRST_LOOK_SECONDS = 1.0  # at what the process waits for
_NEXT_LOOK_SECONDS = 5.0
_MAX_SHOWN_FILES = 5
_MAX_SHOWN_COPIES = 4


class Unwritable(enum.Enum):
    """What to do about files that cannot be written back."""

    REFUSE = enum.auto()
    WAIT = enum.auto()
    DISCARD = enum.auto()


class UnwrittenError(CommandError):
    """The mount stays, because some of its dirty pages could not be written back."""


class UnfinishedError(RemoteError):
    """The mount is unmounted, but its process has not ended in time."""

    exit_code = 3


def umount(
    mount: RemoteMount,
    *,
    lazy: bool = False,
    timeout: float | None = None,
    unwritable: Unwritable = Unwritable.REFUSE,
) -> bool:
    """Unmount and wait until the mount's process has ended; return False if the process could not be found.

    Without a `timeout` it waits END_SECONDS, or COPY_SECONDS while a copy of the mount remains elsewhere. Raises
    RemoteError if the mount is in use, UnwrittenError if dirty pages cannot be written back, and UnfinishedError on
    time-out.
    """
    dead = is_dead(mount.mountpoint)
    config = {} if dead else _config_if_it_answers(mount)
    if config and swap_devices_of(mount.hswap_file(config)):
        raise RemoteError(f"'{mount.mountpoint}' is in use as swap: run tmemfs swapoff {mount.mountpoint} first")
    if dead:
        remove_stale(mount.entry)
    process = None if dead else mount.open_process()
    writes_back = config.get("writeback") == "1"
    if writes_back:
        seconds = DISCARD_SECONDS if unwritable is Unwritable.DISCARD else END_SECONDS
        _write_back(mount, unwritable, seconds if timeout is None else timeout)
    try:
        unmount(mount.mountpoint, lazy=lazy or dead)
    except OSError as error:
        if writes_back:
            mount.write(NAME, ON)
        if error.errno == errno.EBUSY:
            raise RemoteError(
                f"'{mount.mountpoint}' is in use: end what uses it (fuser -vm lists it), or give --lazy"
            ) from error
        raise RemoteError(f"'{mount.mountpoint}' cannot be unmounted: {error.strerror}") from error
    if process is None:
        return dead
    pid, pidfd = process
    try:
        _wait_for_end(mount.entry, pidfd, f"its process (pid {pid})", timeout)
    finally:
        os.close(pidfd)
    return True


def _config_if_it_answers(mount: RemoteMount) -> dict[str, str]:
    """Return the configuration, empty if the mount does not answer: umount(2) still tells whether it is in use."""
    try:
        return mount.config()
    except RemoteError:
        return {}


def _write_back(mount: RemoteMount, unwritable: Unwritable, seconds: float) -> None:
    """Turn write-back off and wait until nothing is dirty. Before it raises an error, it turns write-back on again.

    WAIT retries failed files for ever; the others try once. With DISCARD, files that failed, or are not written after
    `seconds`, will be dropped with the mount. With REFUSE they raise UnwrittenError.
    """
    mount.write(NAME, OFF)
    try:
        left = _wait_until_written(mount, unwritable, seconds)
        if not left:
            return
        names = _describe(left)
        if unwritable is not Unwritable.DISCARD:
            raise UnwrittenError(
                f"'{mount.mountpoint}' stays mounted, these files are not written back: {names}; "
                "--wait-backing keeps trying, --discard drops their changes"
            )
        mount.write(NAME, GIVE_UP)
        say(f"'{mount.mountpoint}': changes that are not written back will be lost with the mount: {names}")
    except BaseException:
        mount.write(NAME, ON)
        raise


def _wait_until_written(mount: RemoteMount, unwritable: Unwritable, seconds: float) -> list[Unwritten]:
    """Wait until nothing is dirty; return the dirty files when it makes no sense to wait longer."""
    began = tried = time.monotonic()
    next_message, last_message = began + _FIRST_MESSAGE_SECONDS, ""
    while left := parse(mount.read(NAME)):
        now = time.monotonic()
        failed = sum(bool(file.reason) for file in left)
        if unwritable is Unwritable.WAIT:
            if failed and now >= tried + _RETRY_SECONDS:
                tried = now
                mount.write(NAME, OFF)
        elif now >= began + seconds or failed == len(left) or (failed and unwritable is Unwritable.REFUSE):
            return left
        message = f"'{mount.mountpoint}' is being written back: {_describe(left)}"
        if now >= next_message and message != last_message:
            say(message)
            next_message, last_message = now + _NEXT_MESSAGE_SECONDS, message
        time.sleep(_POLL_SECONDS)
    return []


def _describe(files: list[Unwritten]) -> str:
    """Return the names of files, each with its error."""
    names = [f"'{file.path}' ({file.reason or 'being written'})" for file in files[:_MAX_SHOWN_FILES]]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _wait_for_end(entry: MountEntry, pidfd: int, process: str, timeout: float | None) -> None:
    """Wait for the end of the process; while that takes long, say what it waits for. Raises UnfinishedError."""
    began = time.monotonic()
    last_reason = ""
    pause = _FIRST_LOOK_SECONDS
    while True:
        if select.select([pidfd], [], [], pause if timeout is None else min(pause, timeout))[0]:
            return
        copies = copies_of(entry)
        limit = timeout if timeout is not None else COPY_SECONDS if copies else END_SECONDS
        left = began + limit - time.monotonic()
        reason = f"it serves a copy in {_locations_of(copies)}" if copies else "it writes back, or still has users"
        if left <= 0:
            raise UnfinishedError(
                f"'{entry.mountpoint}' is unmounted, but {process} has not ended after {limit:g} s: {reason}"
            )
        if reason != last_reason:
            say(f"'{entry.mountpoint}' is unmounted; waiting for the end of {process}: {reason}")
            last_reason = reason
        pause = min(left, _NEXT_LOOK_SECONDS)


def _locations_of(copies: list[MountCopy]) -> str:
    """Return where the copies of a mount are and how to unmount each, as text."""
    locations = [
        f"'{copy.mountpoint}' (tmemfs umount {copy.mountpoint})"
        if copy.pid == os.getpid()
        else f"the mount namespace of pid {copy.pid} ({copy.command}), there at '{copy.mountpoint}' "
        f"(end it, or nsenter --mount --target {copy.pid} umount {copy.mountpoint})"
        for copy in copies[:_MAX_SHOWN_COPIES]
    ]
    more = len(copies) - len(locations)
    return ", ".join(locations) + (f" and {more} more" if more else "")
