"""Memory is short: lends are refused early, in words, and nobody is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.tools.children import BenchError
from bench.tools.memcg import limited
from tests.conftest import wait_until
from tests.lending.conftest import MakeGuest
from tests.lending.fakeguest import Denied, FakeGuest
from tests.lending.tmemd import Tmemd
from tmem.arena import SLAB_SIZE
from tmemcommon.headroom import CGROUP_RESERVE
from tmemcommon.sizes import MIB, ram_bytes

LIMIT = 64 * MIB  # tmemd itself takes a third of it, and where it is put in early half


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Return a memory cgroup with a limit."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(limited(LIMIT))
        except (BenchError, OSError) as error:
            pytest.skip(f"no memory cgroup can be made here: {error}")
        yield made


def borrow_all(guest: FakeGuest) -> str:
    """Borrow until the guest is denied; give the reason."""
    while True:
        try:
            guest.ask(64)
        except Denied as denied:
            return str(denied)


@pytest.mark.root
def test_a_memory_cgroup_is_not_run_into(cgroup: Path, tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("256M", within=cgroup)
    one = guest(slabs=4096).join()
    assert "memory" in borrow_all(one)
    held = len(one.held)
    assert 0 < held * 65536 <= LIMIT - CGROUP_RESERVE
    assert one.populated_slabs() == held
    for slab in one.held:
        one.write(slab, b"x" * 65536)  # the slabs are populated, so a write allocates nothing and kills nobody
    one.give(set(one.held))
    wait_until(lambda: one.populated_slabs() == 0, "what was returned is punched")
    assert one.ask_until(64)
    assert tmemd.totals()["denied_memory"] >= 1
    wait_until(lambda: "slabs are not lent: the memory cgroup" in tmemd.log_text(), "the log says so")


def test_the_reserve_of_the_machine_is_left_alone(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M", "--reserve", str(ram_bytes()))
    one = guest(persistent=16).join()
    assert "memory" in borrow_all(one)
    with pytest.raises(Denied, match="memory"):
        one.ask(1, persistent=True)
    assert one.populated_slabs() == 0
    wait_until(lambda: "are reserved" in tmemd.log_text(), "the log says so")


@pytest.mark.root
def test_what_is_kept_in_pipes_stays_booked_for_its_user(cgroup: Path, tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M", within=cgroup)
    one, two = guest().join(), guest().join()
    two.give(two.ask_until(1))
    wait_until(lambda: tmemd.totals()["audits"] > 4, "tmemd has looked at what there is")
    held = one.ask_until(128)
    pipes = []
    for slab in sorted(held):
        one.write(slab, b"x" * SLAB_SIZE)
        pipes.append(os.pipe())
        assert os.splice(one.fd, pipes[-1][1], SLAB_SIZE, offset_src=slab * SLAB_SIZE) == SLAB_SIZE
    one.give(set(one.held))
    wait_until(lambda: one.populated_slabs() == 0, "what was returned is punched")
    wait_until(lambda: tmemd.totals()["pinned_bytes"] >= 5 << 20, "what lives on is booked")
    borrow_all(two)
    assert len(two.held) <= 256 - 80
    for ends in pipes:
        for fd in ends:
            os.close(fd)
    wait_until(lambda: tmemd.totals()["pinned_bytes"] == 0, "it is free")
