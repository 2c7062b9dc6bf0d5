"""tmemd's command line as a person meets it, and its end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import run
from tests.lending.conftest import MakeGuest
from tests.lending.tmemd import CHECKED, Tmemd, one_line


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ((), "--size"),
        (("--size", "none"), "--size"),
        (("--size", "1K"), "64K"),
        (("--size", "101%"), "101%"),
        (("--size", "1000T"), "more than all RAM: give at most"),
        (("--size", "1M", "--reserve", "1000T"), "more than all RAM: give at most"),
        (("--size", "1M", "--mode", "rw"), "mode"),
        (("--size", "1M", "--group", "no-such-group"), "no-such-group"),
        (("--size", "1M", "--policy", "best"), "best"),
        (("--size", "1M", "--socket", "/nonexistent/dir/t.sock"), "/nonexistent/dir/t.sock"),
        (("--size", "1M", "--uid-cap", "much"), "--uid-cap"),
        (("--size", "1M", "surplus"), "surplus"),
    ],
)
def test_tmemd_refuses_bad_input_with_one_line(tmp_path: Path, words: tuple[str, ...], hint: str) -> None:
    socket = () if "--socket" in words else ("--socket", os.fspath(tmp_path / "t.sock"))
    assert hint in one_line(run(*CHECKED, *words, *socket))
    assert not (tmp_path / "t.sock").exists()


def test_a_second_tmemd_on_the_same_socket_refuses(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one = guest().join()
    line = one_line(run(*CHECKED, "--size", "1M", "--socket", tmemd.socket))
    assert "another tmemd" in line
    assert one.ask(1), "the first goes on"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_tmemd_cleanly_once_its_socket_is_visible(tmemd: Tmemd, number: int) -> None:
    tmemd.start()
    assert tmemd.process is not None
    tmemd.process.send_signal(number)
    tmemd.finish()
    assert not tmemd.socket.exists()


def test_a_hangup_changes_nothing(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start()
    one = guest().join()
    os.killpg(tmemd.pid, signal.SIGHUP)  # workers too
    one.give(one.ask(4))
    assert tmemd.totals()["hangs"] == 0
    assert "worker has ended" not in tmemd.log_text()
