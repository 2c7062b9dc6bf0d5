"""A guest that makes calls on its arena hang: it holds the lock of its memfd for as long as its filesystem likes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SECONDS, has_ended, state_of, wait_until
from tests.fs.failing import FailingBacking, backing
from tests.lending.conftest import MakeGuest
from tests.lending.fakeguest import Denied, FakeGuest
from tests.lending.otheruser import OTHER_UID, as_other
from tests.lending.tmemd import Tmemd
from tmem.arena import SLAB_SIZE
from tmem.lending.daemon.executor import MAX_HANGING
from tmem.lending.daemon.server import MAX_CLOSING_PER_USER
from tmem.lending.protocol.messages import VERSION, Hello
from tmem.lending.protocol.wire import encode

__all__ = ["backing"]
pytestmark = [pytest.mark.mount]

# The kernel waits for the page that is to be written with the lock of the file that it is written to.
WRITE = """
import mmap, os, sys
source = os.open(sys.argv[2], os.O_RDONLY)
page = mmap.mmap(source, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
print("now", flush=True)
os.pwrite(int(sys.argv[1]), page, 0)
"""

Lock = Callable[[FakeGuest, str], subprocess.Popen[str]]


@pytest.fixture
def lock(backing: FailingBacking) -> Iterator[Lock]:
    """Return a function that locks a guest's memfd by a hanging read of a named file.

    The lock is held until the backing answers again or the process is killed.
    """
    writers: list[subprocess.Popen[str]] = []

    def make(guest: FakeGuest, name: str) -> subprocess.Popen[str]:
        (backing.directory / name).write_bytes(b"x" * 4096)
        backing.fail("read * hang")
        words = [sys.executable, "-c", WRITE, str(guest.fd), os.fspath(backing.mountpoint / name)]
        writer = subprocess.Popen(words, pass_fds=[guest.fd], stdout=subprocess.PIPE, text=True)
        writers.append(writer)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "now\n"
        wait_until(lambda: state_of(writer.pid) in "DS", "it waits for its page")
        return writer

    try:
        yield make
    finally:
        backing.fail()
        for writer in writers:
            writer.kill()
            writer.communicate(timeout=SECONDS)


def workers(tmemd: Tmemd) -> int:
    """Count the processes that tmemd has started."""
    tasks = Path(f"/proc/{tmemd.pid}/task")
    return sum(len((task / "children").read_text().split()) for task in tasks.iterdir())


def row_of(tmemd: Tmemd, guest: FakeGuest) -> dict[str, Any]:
    return next(row for row in tmemd.rows() if row["guest"] == guest.number)


def test_a_guest_whose_memfd_is_locked_stops_nobody_and_keeps_it_booked(
    tmemd: Tmemd, guest: MakeGuest, lock: Lock, backing: FailingBacking
) -> None:
    tmemd.start("4M")
    bad, good = guest(name="/mnt/bad").join(), guest(name="/mnt/good").join()
    bad.ask_until(32)
    lock(bad, "one")
    bad.give(set(bad.held))
    wait_until(lambda: row_of(tmemd, bad)["state"] == "hanging", "it is noticed")
    good.ask_until(32)
    assert len(good.held) == 32, "what may still be populated is lent to nobody"
    assert tmemd.totals()["unpunched_bytes"] == 32 * SLAB_SIZE
    good.give(set(good.held))
    good.ask_until(32)
    assert bad.populated_slabs() == 32
    backing.fail()
    wait_until(lambda: tmemd.totals()["unpunched_bytes"] == 0, "it is punched at last")
    good.give(set(sorted(good.held)[:8]))
    bad.ask_until(8)
    assert tmemd.totals()["hangs"] == 1


def test_a_tmemd_that_is_killed_leaves_socket_and_lock_to_the_next_one(
    tmemd: Tmemd, guest: MakeGuest, lock: Lock, backing: FailingBacking
) -> None:
    tmemd.start("32M")
    bad, good = guest(name="/mnt/bad").join(), guest(512, name="/mnt/good").join()
    bad.ask_until(32)
    held = good.ask_until(8)
    lock(bad, "one")
    bad.give(set(bad.held))
    wait_until(lambda: row_of(tmemd, bad)["state"] == "hanging", "it is noticed")
    killed = tmemd.pid
    tmemd.kill()
    assert has_ended(killed)
    good.leave()
    tmemd.start("32M")
    good.join_patiently()
    assert good.held == held
    good.give(good.ask_until(8))
    assert {row["state"] for row in tmemd.rows()} == {"away", "connected"}
    bad.leave()
    bad.join_patiently()
    with contextlib.suppress(Denied):
        while True:
            good.ask(64)
    assert len(good.held) <= 480, "what the hanging guest may have is booked"
    backing.fail()
    good.ask_until(512 - len(good.held))


@pytest.mark.root
def test_many_guests_that_hang_cost_others_one_wait_and_a_few_processes(
    tmemd: Tmemd, guest: MakeGuest, lock: Lock, backing: FailingBacking
) -> None:
    def another_user() -> None:
        other = guest().join()
        other.give(other.ask_until(32))
        other.ask_until(32)

    tmemd.start("16M", "--mode", "0666")
    crowd = [guest().join() for _ in range(8)]
    for number, bad in enumerate(crowd):
        bad.ask_until(4)
        lock(bad, str(number))
    for bad in crowd:
        bad.give(set(bad.held))
    wait_until(lambda: tmemd.totals()["unpunched_bytes"] == 32 * SLAB_SIZE, "all of them wait")
    as_other(another_user)
    assert workers(tmemd) <= MAX_HANGING + 2
    backing.fail()
    wait_until(lambda: tmemd.totals()["unpunched_bytes"] == 0, "all of them are done")
    wait_until(lambda: workers(tmemd) <= 2, "no process is left behind")


def test_a_descriptor_whose_close_hangs_stops_nobody(tmemd: Tmemd, guest: MakeGuest, backing: FailingBacking) -> None:
    tmemd.start("4M")
    (backing.directory / "one").write_bytes(b"x")
    path = backing.mountpoint / "one"
    for sent in (1, 2):  # as an arena, and unasked for
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
            open(path, "rb") as file,
        ):
            backing.fail("flush * hang")
            client.connect(os.fspath(tmemd.socket))
            hello = encode(Hello(VERSION, os.urandom(16), "/mnt/bad", 64))
            socket.send_fds(client, [hello], [file.fileno()] * sent)
            client.settimeout(SECONDS)
            client.recv(1)  # refused, or cut off
            guest().join().ask(1)
            backing.fail()
    links = Path(f"/proc/{tmemd.pid}/fd")
    wait_until(lambda: os.fspath(path) not in map(os.path.realpath, links.iterdir()), "nothing of them is kept")


@pytest.mark.root
def test_a_user_whose_descriptors_hang_in_close_cannot_connect(
    tmemd: Tmemd, guest: MakeGuest, backing: FailingBacking
) -> None:
    tmemd.start("4M", "--mode", "0666")
    (backing.directory / "one").write_bytes(b"x")
    with open(backing.mountpoint / "one", "rb") as file:
        backing.fail("flush * hang")

        def send() -> bytes:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(SECONDS)
                os.seteuid(OTHER_UID)  # in this process: the end of another one would wait for its close, too
                try:
                    client.connect(os.fspath(tmemd.socket))
                finally:
                    os.seteuid(0)
                with contextlib.suppress(ConnectionError):
                    socket.send_fds(client, [encode(Hello(VERSION, os.urandom(16), "/mnt/bad", 64))], [file.fileno()])
                    return client.recv(100)
                return b""

        answers = [send() for _ in range(MAX_CLOSING_PER_USER + 1)]
        guest().join().ask(1)
        backing.fail()
    assert all(b"not a memfd" in answer for answer in answers[:-1])
    assert answers[-1] == b""
