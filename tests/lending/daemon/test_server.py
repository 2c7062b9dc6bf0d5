"""tmemd as a process: guests join, are lent populated slabs, give them back, leave and end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import SECONDS, environment, wait_until
from tests.lending.conftest import MakeGuest
from tests.lending.fakeguest import Denied, GuestRefused
from tests.lending.tmemd import Tmemd

BORROWS = """
import sys, time
from pathlib import Path
from tests.lending.fakeguest import FakeGuest
guest = FakeGuest(Path(sys.argv[1]), 256, sys.argv[2], int(sys.argv[4])).join()
guest.ask_until(int(sys.argv[3]))
if int(sys.argv[4]):
    guest.ask_until(int(sys.argv[4]), persistent=True)
print("lent", flush=True)
time.sleep(600)
"""


class Child:
    """A process that borrows so many slabs and keeps them; `line` is what it says once it has them."""

    def __init__(self, tmemd: Tmemd, slabs: int, persistent: int = 0, script: str = BORROWS) -> None:
        words = [sys.executable, "-c", script, os.fspath(tmemd.socket), "/mnt/child", str(slabs), str(persistent)]
        self.process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()

    def end(self) -> None:
        """Kill it with -9, unless it has ended."""
        self.process.kill()
        self.process.wait(SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()


MakeChild = Callable[..., Child]


@pytest.fixture
def child(tmemd: Tmemd) -> Iterator[MakeChild]:
    """Return a factory of processes that borrow; it takes the arguments of Child."""
    made: list[Child] = []

    def make(*arguments: int, **named: str | int) -> Child:
        made.append(Child(tmemd, *arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.end()


def test_lent_slabs_are_populated_and_returned_ones_are_not(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one = guest().join()
    assert one.populated_slabs() == 0
    got = one.ask(20)
    assert len(got) == 20
    assert one.populated_slabs() == 20
    for slab in got:
        one.write(slab, b"mine")
    one.give(set(sorted(got)[:5]))
    wait_until(lambda: one.populated_slabs() == 15, "returned slabs are punched")
    assert one.read(max(got), 4) == b"mine"


def test_no_more_is_lent_than_there_is(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    one, two = guest().join(), guest().join()
    one.ask_until(40)
    two.ask_until(24)
    assert one.populated_slabs() + two.populated_slabs() == 64
    totals = tmemd.totals()
    assert totals["free_bytes"] == 0


def test_what_one_gives_back_another_gets(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    one, two = guest().join(), guest().join()
    one.give(one.ask_until(64))
    assert len(two.ask_until(64)) == 64
    wait_until(lambda: one.populated_slabs() == 0, "returned slabs are punched")


def test_a_guest_that_does_not_answer_is_taken_from_and_told(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    silent, busy = guest(), guest()
    silent.join().ask_until(64)
    busy.join()
    got = busy.ask_until(16)
    assert len(got) >= 16
    wait_until(lambda: silent.populated_slabs() + busy.populated_slabs() <= 64, "what was taken is punched")
    silent.settle()
    assert len(silent.held) == silent.populated_slabs() <= 48


def test_a_persistent_slab_is_never_taken(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    keeper, busy = guest(persistent=64).join(), guest().join()
    kept = keeper.ask_until(40, persistent=True)
    for slab in kept:
        keeper.write(slab, b"kept")
    busy.ask_until(24)
    with pytest.raises(Denied):
        busy.ask(1)
    keeper.settle()
    assert keeper.persistent == kept
    assert all(keeper.read(slab, 4) == b"kept" for slab in kept)


def test_the_end_of_a_connection_is_not_the_end_of_a_guest(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    one = guest().join()
    held = one.ask_until(30)
    one.leave()
    wait_until(lambda: [row["state"] for row in tmemd.rows()] == ["away"], "the guest is away")
    assert tmemd.rows()[0]["ephemeral_bytes"] == 30 << 16
    assert one.populated_slabs() == 30
    one.join_patiently()
    assert one.held == held
    assert len(tmemd.rows()) == 1


def test_a_returning_guest_claims_its_slabs_and_the_rest_is_punched(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    one = guest().join()
    held = one.ask_until(30)
    one.leave()
    one.held = set(sorted(held)[:10])
    one.write(200, b"never lent")
    one.join_patiently()
    wait_until(lambda: one.populated_slabs() == 10, "the complement is punched")
    wait_until(lambda: tmemd.rows()[0]["ephemeral_bytes"] == 10 << 16, "the ledger says so")


def test_the_end_of_a_process_frees_what_it_held(tmemd: Tmemd, guest: MakeGuest, child: MakeChild) -> None:
    tmemd.start("4M")
    other = child(20, persistent=20)
    assert other.line == "lent"
    assert {row["name"]: row["persistent_bytes"] for row in tmemd.rows()} == {"/mnt/child": 20 << 16}
    other.end()
    wait_until(lambda: tmemd.rows() == [], "the guest is gone")
    assert len(guest().join().ask_until(64)) == 64


def test_a_process_that_ends_while_it_is_away_is_noticed(tmemd: Tmemd, child: MakeChild) -> None:
    tmemd.start("4M")
    other = child(20, script=BORROWS.replace("print(", "guest.leave(); print("))
    wait_until(lambda: [row["state"] for row in tmemd.rows()] == ["away"], "the guest is away")
    other.end()
    wait_until(lambda: tmemd.rows() == [], "the guest is gone")


def test_a_dead_guests_memory_is_freed_although_a_child_has_its_memfd(
    tmemd: Tmemd, guest: MakeGuest, child: MakeChild
) -> None:
    tmemd.start("4M")
    says = 'print("lent", flush=True)'
    assert says in BORROWS
    forks = "import os; heir = os.fork()\nif heir: print(guest.fd, heir, flush=True)"
    parent = child(20, script=BORROWS.replace(says, forks))
    fd, heir = map(int, parent.line.split())
    try:
        arena = f"/proc/{heir}/fd/{fd}"
        assert os.stat(arena).st_blocks * 512 == 20 << 16
        parent.end()
        wait_until(lambda: tmemd.rows() == [], "the guest is gone")
        assert os.stat(arena).st_blocks == 0
    finally:
        os.kill(heir, signal.SIGKILL)
    assert len(guest().join().ask_until(64)) == 64


def test_what_is_written_beyond_the_lent_slabs_is_punched_and_counted(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    one = guest().join()
    one.ask_until(3)
    free = max(one.held) + 10
    for slab in range(free, free + 5):
        one.write(slab, b"x" * 4096)
    wait_until(lambda: one.populated_slabs() == 3, "the audit punched it")
    assert tmemd.totals()["excess_audits"] >= 1
    assert len(one.ask_until(3)) == 3, "an honest guest's late put is no reason to cut it off"


def test_who_keeps_taking_memory_that_was_not_lent_is_lent_no_more(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one = guest(slabs=1024, persistent=64).join()
    one.ask_until(3)
    kept = one.ask_until(3, persistent=True)

    def overdo() -> bool:
        for slab in range(600, 800):
            one.write(slab, b"x" * 65536)
        return [row["state"] for row in tmemd.rows()] == ["barred"]

    wait_until(overdo, "the guest is barred")
    with pytest.raises(Denied):
        one.ask(1)
    wait_until(lambda: one.populated_slabs() == len(kept), "only what is persistent stays")
    assert tmemd.rows()[0]["persistent_bytes"] == len(kept) << 16


def test_a_guest_is_not_registered_twice(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start()
    one, two = guest().join(), guest()
    two.token = one.token
    with pytest.raises(GuestRefused, match=r"arena|token"):
        two.join()
    os.close(two.fd)
    two.fd, two.token = os.dup(one.fd), os.urandom(16)
    with pytest.raises(GuestRefused, match="arena"):
        two.join()
    assert len(tmemd.rows()) == 1


@pytest.mark.root  # nobody else may change the limits of a process that is not dumpable
def test_a_tmemd_without_descriptors_refuses_guests_and_serves_the_others(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    calm = guest().join()
    assert calm.ask(4)
    _, most = resource.prlimit(tmemd.pid, resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir(f"/proc/{tmemd.pid}/fd")))
    free = [number for number in range(1000) if number not in used]
    for spare in (1, 2, 3):  # a fourth is needed
        resource.prlimit(tmemd.pid, resource.RLIMIT_NOFILE, (free[spare], most))
        with pytest.raises((GuestRefused, OSError)):
            guest().join()
        wait_until(lambda: set(map(int, os.listdir(f"/proc/{tmemd.pid}/fd"))) <= used, "all are closed again")
    resource.prlimit(tmemd.pid, resource.RLIMIT_NOFILE, (most, most))
    assert calm.ask(4)
    assert guest().join().ask(4)


def test_the_table_and_the_totals_tell_the_same(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    for number in range(5):
        guest(name=f"/mnt/{number}", persistent=32).join().ask_until(number + 1, persistent=number % 2 == 0)
    rows, totals = tmemd.rows(), tmemd.totals()
    assert json.dumps(rows)
    assert sum(row["ephemeral_bytes"] for row in rows) == totals["ephemeral_bytes"]
    assert sum(row["persistent_bytes"] for row in rows) == totals["persistent_bytes"]
    assert totals["guests"] == totals["connected"] == 5
