"""Identifies the process at the other end of a socket, and finds a known process again."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from tmem.lending.lender.actions import Refusal
from tmemcommon import libc

_SO_PEERPIDFD = 77  # since Linux 6.5; not named by this Python
_CREDENTIALS = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Process:
    """One process. Pids are reused, but a pid with its start time is unique."""

    pid: int
    started: int  # in clock ticks since boot
    uid: int


def peer(connection: socket.socket) -> tuple[Process, int] | None:
    """Return the peer's process and a pidfd, which the caller closes; None if it has ended or cannot be seen."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if pid <= 0:  # in another pid namespace
        return None
    try:
        pidfd = _peer_pidfd(connection, pid)
    except OSError:
        return None
    started = start_time(pid)
    # The pid cannot have been reused if the pidfd shows that the process still runs.
    if started is None or has_ended(pidfd):
        os.close(pidfd)
        return None
    return Process(pid, started, uid), pidfd


def reopen(process: Process) -> int | None:
    """Open a pidfd of a known process; return None if it has ended."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return None
    if start_time(process.pid) == process.started and not has_ended(pidfd):
        return pidfd
    os.close(pidfd)
    return None


def duplicate(pidfd: int) -> int:
    """Duplicate a pidfd. Raises Refusal if no descriptor is free."""
    try:
        return os.dup(pidfd)
    except OSError as error:
        reason = f"tmemd cannot take another guest: {error.strerror}; unmount one first, or raise its limit (ulimit -n)"
        raise Refusal(reason, retry=True) from None


def make_undumpable() -> None:
    """Deny processes of the same user access to this process's descriptors and memory."""
    try:
        libc.prctl(libc.PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise OSError(error.errno, "this process cannot be made undumpable") from None


def state(pid: int) -> str | None:
    """Return a process's state as the letter that ps shows; None if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][0]
    except (OSError, IndexError):
        return None


def start_time(pid: int) -> int | None:
    """Return the start time of a process, in clock ticks since boot; None if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def has_ended(pidfd: int) -> bool:
    """Return whether the process has ended, even if its parent has not waited for it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _peer_pidfd(connection: socket.socket, pid: int) -> int:
    """Open a pidfd of the process that connected; before Linux 6.5, of the process that has its pid now."""
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid)
    os.set_inheritable(pidfd, False)
    return pidfd
