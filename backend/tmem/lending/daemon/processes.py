"""Which process is at the other end of a socket, and whether a process that was known before still runs."""

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
    """One process: pids are used again, a pid with its start time is not."""

    pid: int
    started: int  # in clock ticks since the machine's start
    uid: int


def peer(connection: socket.socket) -> tuple[Process, int] | None:
    """Tell who connected, and give a pidfd of it, which the caller closes; None when it is gone or not to be seen."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if pid <= 0:  # of another pid namespace
        return None
    try:
        pidfd = _peer_pidfd(connection, pid)
    except OSError:
        return None
    started = start_time(pid)
    # The pid is this process's as long as the pidfd says that it runs.
    if started is None or has_ended(pidfd):
        os.close(pidfd)
        return None
    return Process(pid, started, uid), pidfd


def reopen(process: Process) -> int | None:
    """Open a pidfd of a process that was known before; None when it has ended."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return None
    if start_time(process.pid) == process.started and not has_ended(pidfd):
        return pidfd
    os.close(pidfd)
    return None


def duplicate(pidfd: int) -> int:
    """Duplicate a pidfd. Raises Refusal when there is no descriptor left for it."""
    try:
        return os.dup(pidfd)
    except OSError as error:
        reason = f"tmemd cannot take another guest: {error.strerror}; unmount one first, or raise its limit (ulimit -n)"
        raise Refusal(reason, retry=True) from None


def make_undumpable() -> None:
    """Let nobody of the same user at this process's descriptors and memory."""
    try:
        libc.prctl(libc.PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise OSError(error.errno, "this process cannot be made undumpable") from None


def state(pid: int) -> str | None:
    """Read the letter of a process's state, as ps shows it; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][0]
    except (OSError, IndexError):
        return None


def start_time(pid: int) -> int | None:
    """Read when a process was started, in clock ticks since the machine's start."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def has_ended(pidfd: int) -> bool:
    """Tell whether the process has ended, waited for by its parent or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _peer_pidfd(connection: socket.socket, pid: int) -> int:
    """Open a pidfd of exactly the process that connected; before Linux 6.5 of whoever has its pid now."""
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid)
    os.set_inheritable(pidfd, False)
    return pidfd
