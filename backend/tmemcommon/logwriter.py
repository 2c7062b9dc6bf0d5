"""A log that never blocks its callers: they queue lines, and a thread writes them.

The event loop logs, so a log that blocks would block all requests: its disk may hang, or a pipe may be full. The queue
is bounded. Lines that do not fit are counted, and the count is logged when writing works again. A fork does not copy
the thread, so the log is created in the process that uses it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import stat
import threading
from pathlib import Path

MAX_QUEUED = 1000  # lines: 100 bytes each as a rule, a few thousand with a traceback
FLUSH_SECONDS = 2.0  # the end of the process waits no longer for a log that hangs


class LogWriter(logging.Handler):
    """Writes lines to a descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._queue: queue.Queue[bytes | threading.Event | None] = queue.Queue(MAX_QUEUED)
        self._lost = 0
        self._lost_lock = threading.Lock()  # protects `_lost`; never held over a wait
        threading.Thread(target=self._run, name="log", daemon=True).start()

    @classmethod
    def to_stderr(cls) -> LogWriter:
        """Log to a duplicate of stderr."""
        try:
            return cls(os.dup(2))
        except OSError:  # stderr is closed
            return cls(os.open(os.devnull, os.O_WRONLY))

    def emit(self, record: logging.LogRecord) -> None:
        """Format a record and queue the line. Formatting cannot be deferred: the arguments may change."""
        try:
            self._queue.put_nowait(self._line(record))
        except queue.Full:
            self._count_lost(1)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all queued lines are written, at most FLUSH_SECONDS for each step."""
        done = threading.Event()
        try:
            self._queue.put(done, timeout=FLUSH_SECONDS)
        except queue.Full:
            return
        done.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Stop the thread after all queued lines are written."""
        with contextlib.suppress(queue.Full):  # it hangs; the thread ends with the process
            self._queue.put_nowait(None)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode(errors="backslashreplace")

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, bytes) and not self._write(item):
                self._count_lost(1)
            if self._queue.empty():
                self._report_lost()
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

    def _count_lost(self, number: int) -> None:
        with self._lost_lock:
            self._lost += number

    def _report_lost(self) -> None:
        """Write how many lines are missing; keep the count if that cannot be written either."""
        with self._lost_lock:
            lost, self._lost = self._lost, 0
        if lost:
            message = "%d lines are missing here: the log could not be written, or not in time"
            record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (lost,), None)
            if not self._write(self._line(record)):
                self._count_lost(lost)


class LogFile(LogWriter):
    """A log file that can be reopened after logrotate(8) renamed it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        fd = self._open(0o666)
        self._mode = stat.S_IMODE(os.fstat(fd).st_mode)  # for reopen, when the umask may have changed
        super().__init__(fd)

    def _open(self, mode: int) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)

    def reopen(self) -> None:
        """Reopen the path, creating the file if it is missing. An OSError leaves the old file in use."""
        self.flush()
        fd = self._open(self._mode)
        os.dup2(fd, self._fd, inheritable=False)  # atomic: the thread may be writing
        os.close(fd)
