"""tmemd under a service manager: the units, a passed socket, and notifications."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import click
import pytest

from tests.conftest import REPOSITORY, SECONDS, environment
from tests.lending.conftest import MakeGuest
from tests.lending.tmemd import CHECKED, Tmemd
from tmem.lending.daemon.tmemd import command

PACKAGING = REPOSITORY / "packaging"

# What a manager does: the socket becomes descriptor 3, and the variables name the process that it is for.
MANAGED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", NOTIFY_SOCKET=sys.argv[2], RUNTIME_DIRECTORY=sys.argv[3])
os.execv(sys.argv[4], sys.argv[4:])
"""


def unit(name: str) -> ConfigParser:
    """Read a unit file."""
    parser = ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(PACKAGING / name)
    return parser


class Manager:
    """A service manager with one socket, which starts tmemd on it."""

    def __init__(self, tmemd: Tmemd) -> None:
        self.tmemd = tmemd
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(os.fspath(tmemd.socket))
        self.listener.listen(16)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(SECONDS)
        self.socket.bind(os.fspath(tmemd.directory / "notify"))

    def start(self) -> None:
        """Start a tmemd and wait until it says that it is ready."""
        fd = self.listener.fileno()
        words = [sys.executable, "-c", MANAGED, str(fd), os.fspath(self.tmemd.directory / "notify")]
        words += [os.fspath(self.tmemd.directory), *CHECKED, "--size", "8M", "--reserve", "1M"]
        with open(self.tmemd.log, "ab") as log:
            self.tmemd.process = subprocess.Popen(words, env=environment(), pass_fds=[fd], stdout=log, stderr=log)
        assert b"READY=1" in self.socket.recv(1000).split(b"\n")

    def close(self) -> None:
        """Close the sockets."""
        self.listener.close()
        self.socket.close()


@pytest.fixture
def manager(tmemd: Tmemd) -> Iterator[Manager]:
    made = Manager(tmemd)
    with contextlib.closing(made):
        yield made


def test_a_passed_socket_is_served_and_outlives_tmemd(manager: Manager, tmemd: Tmemd, guest: MakeGuest) -> None:
    manager.start()
    one = guest().join()
    held = one.ask_until(50)
    assert (tmemd.directory / "holdings").exists()
    tmemd.kill()
    one.leave()
    assert tmemd.socket.exists()
    manager.start()
    assert [row["state"] for row in tmemd.rows()] == ["away"]
    one.join_patiently()
    assert one.held == held
    tmemd.stop()
    assert manager.socket.recv(1000) == b"STOPPING=1"
    assert tmemd.socket.exists(), "the socket is the manager's"


def test_a_guest_that_comes_before_tmemd_waits_for_it(manager: Manager, tmemd: Tmemd, guest: MakeGuest) -> None:
    early = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    early.connect(os.fspath(tmemd.socket))
    manager.start()
    assert guest().join().ask(1)
    early.close()


def test_the_service_starts_tmemd_with_options_that_it_knows() -> None:
    service = unit("tmemd.service")["Service"]
    program, *words = service["ExecStart"].split()
    assert Path(program).name == "tmemd"
    context: click.Context = command.make_context("tmemd", words)
    assert context.params["size"] > 0
    assert service["Type"] == "notify"


def test_the_units_belong_together_and_leave_what_tmemd_needs() -> None:
    service, passed = unit("tmemd.service"), unit("tmemd.socket")
    assert service["Unit"]["Requires"] == "tmemd.socket"
    assert passed["Socket"]["ListenStream"] == "/run/tmemd.sock"
    assert service["Service"]["RuntimeDirectoryPreserve"] == "yes"
    assert service["Service"]["KillMode"] == "process", "no restart waits for a worker that hangs"
    assert service["Service"]["RestrictAddressFamilies"] == "AF_UNIX"
    for hides_guests in ("ProtectProc", "PrivateUsers", "ProcSubset", "PrivatePIDs"):
        assert hides_guests not in service["Service"]


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is missing")
    program = tmp_path / "tmemd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("tmemd.service", "tmemd.socket"):
        text = (PACKAGING / name).read_text().replace("/usr/local/bin/tmemd", os.fspath(program))
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [analyze, "verify", "--man=no", os.fspath(tmp_path / "tmemd.service"), os.fspath(tmp_path / "tmemd.socket")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "tmemd" in line]
    assert ours == []
