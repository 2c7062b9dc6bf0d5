"""tmemd is killed, ended, started again, smaller or without its file; guests are stopped, killed and continued."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import SECONDS, environment, wait_until
from tests.lending.conftest import MakeGuest
from tests.lending.daemon.randomguest import RandomGuest
from tests.lending.fakeguest import Denied, FakeGuest
from tests.lending.tmemd import Tmemd

SIZE, SLABS = "8M", 128


def agree(tmemd: Tmemd, *guests: FakeGuest) -> None:
    """Wait until ledger, guests and memory say the same of each guest."""

    def said() -> bool:
        rows = {row["guest"]: row for row in tmemd.rows()}
        for guest in guests:
            guest.settle()
            row = rows[guest.number]
            held = row["ephemeral_bytes"] >> 16, row["persistent_bytes"] >> 16
            if held != (len(guest.held), len(guest.persistent)) or sum(held) != guest.populated_slabs():
                return False
        return True

    wait_until(said, "ledger, guests and memory agree")


def get_on(borrowers: list[RandomGuest], killed: int) -> bool:
    """Return whether every guest has noticed each kill and borrowed since the last, or one has failed."""
    return all(borrower.lives == killed + 1 or not borrower.is_alive() for borrower in borrowers)


def kill_again_and_again(tmemd: Tmemd, times: int, seed: int) -> None:
    """Kill tmemd under guests that borrow, so many times; nothing persistent may be lost, the ledger must be right."""
    rng = random.Random(seed)
    borrowers = [RandomGuest(tmemd.socket, number, seed) for number in range(3)]
    tmemd.start(SIZE)
    try:
        for borrower in borrowers:
            borrower.start()
        for killed in range(times):
            wait_until(lambda killed=killed: get_on(borrowers, killed), "every borrower gets on")  # type: ignore[misc]
            time.sleep(rng.random() * 0.05)
            tmemd.kill()
            # Nothing changes while nobody lends: the populated memory is at most the size.
            assert sum(borrower.guest.populated_slabs() for borrower in borrowers) <= SLABS
            tmemd.start(SIZE)
        wait_until(lambda: get_on(borrowers, times), "every borrower has come back")
    finally:
        for borrower in borrowers:
            borrower.finish()
    for borrower in borrowers:
        borrower.guest.answer_revokes()
        borrower.verify()
    agree(tmemd, *(borrower.guest for borrower in borrowers))
    for borrower in borrowers:
        borrower.guest.close()


def test_a_killed_tmemd_loses_no_persistent_page_and_books_are_right(tmemd: Tmemd) -> None:
    kill_again_and_again(tmemd, 6, seed=1)


@pytest.mark.slow
def test_a_hundred_kills_cost_nothing_persistent(tmemd: Tmemd) -> None:
    kill_again_and_again(tmemd, 100, seed=2)


def test_what_old_guests_hold_is_not_lent_to_newcomers(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    old = guest(slabs=SLABS, persistent=64)
    old.join()
    old.ask_until(60)
    old.ask_until(60, persistent=True)
    tmemd.kill()
    tmemd.start(SIZE)
    (row,) = tmemd.rows()
    assert row["state"] == "away"
    new = guest().join()
    got = 0
    try:
        while True:
            got += len(new.ask(16))
    except Denied:
        pass
    assert got <= 8
    assert old.populated_slabs() + new.populated_slabs() <= SLABS
    old.join_patiently()
    agree(tmemd, old, new)


def test_limits_outlive_a_restart(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    one = guest(name="/mnt/a").join()
    assert tmemd.ctl("set", "/mnt/a", "--weight", "3", "--floor", "1M", "--cap", "2M").returncode == 0
    one.ask_until(20)
    tmemd.stop()
    tmemd.start(SIZE)
    one.join_patiently()
    (row,) = tmemd.rows()
    assert (row["weight"], row["floor_bytes"], row["cap_bytes"]) == (3.0, 1 << 20, 2 << 20)


def test_a_smaller_size_takes_back_until_it_fits(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    one, two = guest(persistent=32).join(), guest().join()
    kept = one.ask_until(30, persistent=True)
    one.ask_until(40)
    two.ask_until(50)
    tmemd.kill()
    tmemd.start("3M")
    one.join_patiently()
    two.join_patiently()
    wait_until(lambda: one.populated_slabs() + two.populated_slabs() <= 48, "the guests fit")
    assert one.persistent == kept
    agree(tmemd, one, two)


def test_without_its_file_tmemd_believes_its_guests(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    one = guest(persistent=32).join()
    one.ask_until(20)
    one.ask_until(20, persistent=True)
    tmemd.kill()
    (tmemd.directory / "tmemd.sock.holdings").write_bytes(b"torn")
    tmemd.start(SIZE)
    assert tmemd.rows() == []
    one.join_patiently()
    assert (len(one.held), len(one.persistent)) == (20, 20)
    agree(tmemd, one)


def test_a_claimed_ephemeral_slab_that_is_a_hole_is_answered_as_taken(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    one = guest().join()
    one.ask_until(20)
    tmemd.kill()
    kept = set(sorted(one.held)[:10])
    one.held |= {200, 201, 202}
    tmemd.start(SIZE)
    one.join_patiently()
    agree(tmemd, one)
    assert kept <= one.held
    assert not one.held & {200, 201, 202}


def test_a_guest_that_ended_meanwhile_is_not_booked_any_longer(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    script = f"""
import time
from pathlib import Path
from tests.lending.fakeguest import FakeGuest
guest = FakeGuest(Path({os.fspath(tmemd.socket)!r})).join()
guest.ask_until(100)
print("lent", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "lent\n"
        tmemd.kill()
    finally:
        process.kill()
        process.communicate()
    tmemd.start(SIZE)
    assert tmemd.rows() == []
    assert len(guest(slabs=SLABS).join().ask_until(SLABS)) == SLABS


def test_sigterm_is_a_clean_end_and_guests_keep_what_they_hold(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    one = guest().join()
    one.ask_until(20)
    tmemd.stop()
    assert not tmemd.socket.exists()
    assert one.populated_slabs() == 20
    assert "guests keep what they hold" in tmemd.log_text()
    tmemd.start(SIZE)
    one.join_patiently()
    agree(tmemd, one)


STOPPED = """
import sys, time
from pathlib import Path
from tests.lending.fakeguest import FakeGuest
guest = FakeGuest(Path(sys.argv[1]), 256).join()
guest.ask_until(100)
print("lent", flush=True)
while True:
    guest.answer_revokes()
    print(guest.number, len(guest.held), guest.populated_slabs(), flush=True)
    time.sleep(0.05)
"""


def test_a_stopped_guest_is_taken_from_and_is_right_again_once_continued(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start(SIZE)
    words = [sys.executable, "-c", STOPPED, os.fspath(tmemd.socket)]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "lent\n"
        process.send_signal(signal.SIGSTOP)
        busy = guest().join()
        busy.ask_until(60)
        process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + SECONDS
        while True:
            number, held, populated = process.stdout.readline().split()
            row = next(row for row in tmemd.rows() if row["guest"] == int(number))
            if int(held) == float(populated) == row["ephemeral_bytes"] >> 16 <= SLABS - 60:
                break
            assert time.monotonic() < deadline, f"it holds {held}, {populated} are populated, the ledger says {row}"
        agree(tmemd, busy)
    finally:
        process.kill()
        process.communicate()
