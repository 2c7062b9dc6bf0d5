"""The file that tells the next tmemd what guests hold: never too little, not written for every slab."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import msgspec
import pytest

from tmem.lending.daemon import processes
from tmem.lending.daemon.holdingsfile import HoldingsFile, Record
from tmem.lending.daemon.processes import Process
from tmem.lending.lender.actions import Holding
from tmem.lending.lender.settings import GuestSettings
from tmem.lending.protocol.kind import Kind

TOKEN = b"t" * 16
PROCESS = Process(pid=17, started=99, uid=1000)
CREDIT = 64


def holding(ephemeral: int, persistent: int = 0, slabs: int = 1000, persistent_cap: int = 300) -> Holding:
    return Holding(
        token=TOKEN,
        name="/mnt/a",
        uid=1000,
        pid=17,
        slabs=slabs,
        ephemeral=ephemeral,
        persistent=persistent,
        settings=GuestSettings(cap=900, weight=2.0, floor=10, persistent_cap=persistent_cap),
    )


def records(ephemeral: int, persistent: int = 0) -> list[Record]:
    return [Record.of(holding(ephemeral, persistent), PROCESS, CREDIT)]


@pytest.fixture
def holdings(tmp_path: Path) -> HoldingsFile:
    return HoldingsFile(tmp_path / "holdings", CREDIT)


def test_what_was_written_is_read_and_booked_again(holdings: HoldingsFile) -> None:
    holdings.write([Record.of(holding(100, 20), PROCESS, CREDIT)])
    (record,) = holdings.load()
    assert record.process == PROCESS
    again = record.holding
    assert (again.ephemeral, again.persistent) == (100 + CREDIT, 20 + CREDIT)
    assert (again.token, again.name) == (TOKEN, "/mnt/a")
    assert again.settings == holding(100, 20).settings


def test_no_more_is_put_down_than_the_guest_may_hold(holdings: HoldingsFile) -> None:
    record = Record.of(holding(690, 290), PROCESS, CREDIT)
    assert record.holding.persistent == 300, "its persistent cap"
    assert record.holding.ephemeral == 700, "the rest of its arena"
    assert Record.of(holding(0, 0, persistent_cap=0), PROCESS, CREDIT).holding.persistent == 0


def test_the_file_is_ahead_of_every_lend_and_written_for_few(holdings: HoldingsFile, tmp_path: Path) -> None:
    for held in range(1, 501):
        holdings.cover(TOKEN, Kind.EPHEMERAL, 1, partial(records, held))
        assert holdings.load()[0].holding.ephemeral >= held
    assert holdings.writes <= 500 // CREDIT + 1


def test_the_kinds_have_credits_of_their_own(holdings: HoldingsFile) -> None:
    held = dict.fromkeys(Kind, 0)
    for turn in range(300):
        kind = Kind(turn % 2)
        held[kind] += 1
        holdings.cover(TOKEN, kind, 1, partial(records, held[Kind.EPHEMERAL], held[Kind.PERSISTENT]))
        (record,) = holdings.load()
        assert record.holding.ephemeral >= held[Kind.EPHEMERAL]
        assert record.holding.persistent >= held[Kind.PERSISTENT]


def test_nothing_there_is_nothing_held(holdings: HoldingsFile) -> None:
    assert holdings.load() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'[{"token": "AA=="}]', b"\xff" * 100])
def test_a_file_of_somebody_else_is_nothing_held(
    holdings: HoldingsFile, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "holdings").write_bytes(content)
    assert holdings.load() == []
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("kind", ["link", "fifo", pytest.param("other", marks=pytest.mark.root)])
def test_what_is_no_file_of_this_users_is_not_read(
    holdings: HoldingsFile, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    holdings.write(records(10))
    path = tmp_path / "holdings"
    if kind == "other":
        os.chown(path, 65534, -1)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to("elsewhere") if kind == "link" else os.mkfifo(path)
    assert holdings.load() == []
    assert "cannot be read" in caplog.text


def test_a_file_that_cannot_be_written_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    holdings = HoldingsFile(tmp_path / "missing" / "holdings", CREDIT)
    for held in range(1, 200):
        holdings.cover(TOKEN, Kind.EPHEMERAL, 1, partial(records, 1))
        assert holdings.failures <= held // CREDIT + 1


def test_a_kill_between_writing_and_renaming_leaves_the_old_file(holdings: HoldingsFile, tmp_path: Path) -> None:
    holdings.write([Record.of(holding(5), PROCESS, CREDIT)])
    (tmp_path / "holdings.new").write_bytes(b'[{"tok')
    assert len(holdings.load()) == 1
    holdings.write([])
    assert holdings.load() == []
    assert (tmp_path / "holdings").stat().st_mode & 0o077 == 0


def test_a_record_says_what_a_reader_of_the_file_needs(holdings: HoldingsFile, tmp_path: Path) -> None:
    holdings.write([Record.of(holding(1), PROCESS, CREDIT)])
    (raw,) = msgspec.json.decode((tmp_path / "holdings").read_bytes())
    assert raw["pid"] == 17
    assert raw["started"] == 99


def test_a_process_is_known_again_by_pid_and_start() -> None:
    started = processes.start_time(os.getpid())
    assert started is not None
    pidfd = processes.reopen(Process(os.getpid(), started, 0))
    assert pidfd is not None
    assert not processes.has_ended(pidfd)
    os.close(pidfd)
    assert processes.reopen(Process(os.getpid(), started + 1, 0)) is None


def test_a_process_that_has_ended_is_not_known_again() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    pidfd = os.pidfd_open(child)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert processes.has_ended(pidfd), "also before its parent waits for it"
    started = processes.start_time(child)
    assert started is not None
    assert processes.reopen(Process(child, started, 0)) is None
    os.waitpid(child, 0)
    os.close(pidfd)
    assert processes.start_time(child) != started, "nobody has its pid, or another process"
