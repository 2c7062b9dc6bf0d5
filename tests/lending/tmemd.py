"""A tmemd process for tests, which can be killed and started again on the same socket."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from bench.tools.memcg import join
from tests.conftest import REPOSITORY, SECONDS, environment, wait_until
from tmem.lending.control import tmemctl
from tmem.lending.control.adminconnection import AdminConnection
from tmem.lending.control.tables import as_json

CHECKED = (sys.executable, os.fspath(REPOSITORY / "tests" / "lending" / "checkedtmemd.py"))


class Tmemd:
    """A socket, and the tmemd that listens on it, if any. Any user may enter `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "tmemd.sock"
        self.log = directory / "tmemd.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The pid of the tmemd that runs."""
        assert self.process is not None
        return self.process.pid

    def start(self, size: str = "16M", *options: str, within: Path | None = None) -> None:
        """Start a tmemd, within a cgroup if one is given, and wait until it listens."""
        assert self.process is None
        words = (*CHECKED, "--size", size, "--socket", os.fspath(self.socket), "--reserve", "1M", *options)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                words, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if within is not None:
            join(within, self.process.pid)
        wait_until(self._listens, "tmemd listens")

    def kill(self) -> None:
        """Kill it with -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(SECONDS)
        self.process = None

    def stop(self) -> None:
        """Stop it if it runs; check that it exited well and no check of its ledger failed."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.finish()

    def finish(self) -> None:
        """Wait until it has exited; check that it exited well."""
        process, self.process = self.process, None
        assert process is not None
        try:
            status = process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()
        assert status == 0, self.log_text()[-4000:]
        assert "Traceback" not in self.log_text(), self.log_text()[-4000:]

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run tmemctl in this process, because starting one takes longer than the command."""
        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["tmemctl", "--socket", os.fspath(self.socket), *words]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                tmemctl.main()
        except SystemExit as end:
            return subprocess.CompletedProcess(sys.argv, cast(int, end.code), out.getvalue(), err.getvalue())
        finally:
            sys.argv = before

    def rows(self) -> list[dict[str, Any]]:
        """List the guests, as tmemctl list --json does."""
        with AdminConnection(self.socket) as control:
            return [as_json(row) for row in control.rows()]

    def totals(self) -> dict[str, float]:
        """Return the sums and counters."""
        with AdminConnection(self.socket) as control:
            return dict(control.totals())

    def log_text(self) -> str:
        """Read what all tmemds here have logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log_text()[-4000:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(os.fspath(self.socket)) == 0


def one_line(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Check that a command failed with one line, and return the line."""
    assert done.returncode == code, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(("tmemctl: ", "tmemd: "))
    return line
