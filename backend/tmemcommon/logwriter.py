"""A log that never makes its callers wait: a thread of its own writes what they queue.

The disk of a log hangs like any other, and a terminal or a pipe that nobody reads stops who writes to it; the event
loop logs, so all requests would wait. The queue is bounded: what finds no room is counted, and the log says so once it
can be written again. A fork leaves the thread behind, so the log is made in the process that uses it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import stat
import threading
from pathlib import Path

MOST_WAITING = 1000  # lines; usual ones have a hundred bytes, one with a traceback a few thousand
FLUSH_SECONDS = 2.0  # what the end of a process waits for a log that hangs


class LogWriter(logging.Handler):
    """Writes lines to a descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._waiting: queue.Queue[bytes | threading.Event | None] = queue.Queue(MOST_WAITING)
        self._lost = 0
        self._lost_lock = threading.Lock()  # for `_lost`; nothing is waited for while it is held
        threading.Thread(target=self._run, name="log", daemon=True).start()

    @classmethod
    def to_stderr(cls) -> LogWriter:
        """Log to where stderr leads now."""
        try:
            return cls(os.dup(2))
        except OSError:  # it was started without one
            return cls(os.open(os.devnull, os.O_WRONLY))

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of a record; it is made here, as what it quotes may change."""
        try:
            self._waiting.put_nowait(self._line(record))
        except queue.Full:
            self._lose(1)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait until what was queued before is written, but not for a log that hangs."""
        done = threading.Event()
        try:
            self._waiting.put(done, timeout=FLUSH_SECONDS)
        except queue.Full:
            return
        done.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Have the thread end once all is written."""
        with contextlib.suppress(queue.Full):  # it hangs, and ends with the process
            self._waiting.put_nowait(None)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode(errors="backslashreplace")

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, bytes) and not self._write(item):
                self._lose(1)
            if self._waiting.empty():
                self._tell_lost()
            if isinstance(item, threading.Event):
                item.set()
        os.close(self._fd)

    def _write(self, line: bytes) -> bool:
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError:
            return False
        return True

    def _lose(self, number: int) -> None:
        with self._lost_lock:
            self._lost += number

    def _tell_lost(self) -> None:
        """Say how many lines are missing; count on if that cannot be written either."""
        with self._lost_lock:
            lost, self._lost = self._lost, 0
        if lost:
            words = "%d lines are missing here: the log could not be written, or not in time"
            record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, words, (lost,), None)
            if not self._write(self._line(record)):
                self._lose(lost)


class LogFile(LogWriter):
    """A log that is opened anew at the same path when it is told to, after logrotate(8) renamed the file."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        fd = self._open(0o666)
        self._mode = stat.S_IMODE(os.fstat(fd).st_mode)  # later ones get it, too: the umask may have changed by then
        super().__init__(fd)

    def _open(self, mode: int) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)

    def reopen(self) -> None:
        """Go on in the file that has the path now; made if there is none. OSError leaves everything as it was."""
        self.flush()
        fresh = self._open(self._mode)
        os.dup2(fresh, self._fd, inheritable=False)  # in one step: the thread may be writing
        os.close(fresh)
