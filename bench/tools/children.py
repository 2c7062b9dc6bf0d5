"""Start child processes that never outlive the bench, and end them in bounded time.

A child gets a session of its own: a Ctrl-C reaches only the bench, which then ends its children in order. It also gets
a death signal, so that it ends when the bench is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from tmemcommon import libc

ROOT = Path(__file__).resolve().parents[2]


class BenchError(Exception):
    """A measure cannot be carried out; the text says what to do."""


def environment() -> dict[str, str]:
    """Return an environment in which a child finds the packages of this tree, installed or not."""
    paths = [str(ROOT), str(ROOT / "backend"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _die_with_parent() -> None:
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGTERM)


def start(
    command: Sequence[str | Path],
    *,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child; the caller must call `end`."""
    return subprocess.Popen(
        [os.fspath(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=dict(env) if env is not None else environment(),
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def end(child: subprocess.Popen[bytes], *, patience: float = 15.0) -> None:
    """Terminate a child; kill it and its group after `patience` seconds."""
    with undisturbed():
        _end(child, patience)


def _end(child: subprocess.Popen[bytes], patience: float) -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
    with contextlib.suppress(ProcessLookupError):  # the group is the child's own session
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5.0)


def run(command: Sequence[str | Path], *, seconds: float) -> bytes:
    """Run a command to its end and return its output; BenchError when it fails or takes longer than `seconds`."""
    try:
        child = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise BenchError(f"{command[0]} is missing: run make setup") from None
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{command[0]} did not end within {seconds:g} s") from None
    finally:
        end(child, patience=3.0)
    if child.returncode != 0:
        raise BenchError(f"{command[0]} failed: {err.decode(errors='replace').strip()[-500:]}")
    return out


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP, too, so that every cleanup runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP during a cleanup, which takes bounded time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
