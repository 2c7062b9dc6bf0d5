"""Real swap to borrowed memory, while tmemd is killed and restarted or another guest needs memory."""

from __future__ import annotations

import contextlib
import time

import pytest

from bench.subjects.paging import Pager, Round, pager
from bench.tools.memcg import limited
from tests.conftest import wait_until
from tests.lending.conftest import MakeGuest, guest, tmemd
from tests.lending.fakeguest import Denied, FakeGuest
from tests.lending.tmemd import Tmemd
from tests.swap.swapped import LIMIT, PAGES, ROUND_SECONDS, WORKING_SET, SwappedMount
from tmem import SLAB_SIZE
from tmem.lending.protocol.messages import MAX_ASK

__all__ = ["guest", "tmemd"]

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.timeout(900)]

PART_OF_WRITE, PART_OF_CHECK = f"write {PAGES // 3}", f"check {PAGES // 3}"  # of all pages: where all follow anyway


def test_tmemd_is_killed_and_started_again_while_swap_is_in_use(
    swapped: SwappedMount, tmemd: Tmemd, cgroup_version: int
) -> None:
    tmemd.start("64M")
    swapped.start("--pool", f"unix:{tmemd.socket}")
    with limited(LIMIT, cgroup_version) as cgroup, pager(cgroup, WORKING_SET) as process:
        assert process.run("write", ROUND_SECONDS).wrong == 0
        process.begin("check")
        tmemd.kill()
        assert process.finish(ROUND_SECONDS).wrong == 0
        assert process.run(PART_OF_WRITE, ROUND_SECONDS).wrong == 0  # nobody lends now
        process.begin("check")
        tmemd.start("64M")
        assert process.finish(ROUND_SECONDS).wrong == 0
        wait_until(lambda: swapped.stats()["lender"] == "connected", "the guest has registered again")
        stats = swapped.stats()
        assert stats["hswap_pool_pages"] > PAGES // 8
        assert stats["hswap_puts"] > PAGES * 3 // 4
        assert stats["hswap_lost_pages"] == stats["hswap_overflow_errors"] == 0
        assert tmemd.rows()[0]["persistent_bytes"] > 1 << 20


def test_a_lower_persistent_cap_while_swap_is_in_use_loses_no_page(
    swapped: SwappedMount, tmemd: Tmemd, guest: MakeGuest, cgroup_version: int
) -> None:
    tmemd.start("48M")
    swapped.start("--pool", f"unix:{tmemd.socket}")
    with limited(LIMIT, cgroup_version) as cgroup, pager(cgroup, WORKING_SET) as process:
        assert process.run("write", ROUND_SECONDS).wrong == 0
        other = guest(slabs=768).join()
        process.begin(PART_OF_CHECK)
        assert finish_under_pressure(process, other).wrong == 0
        assert other.held, "the other guest got memory"
        row = next(row for row in tmemd.rows() if row["guest"] != other.number)
        half = row["persistent_bytes"] // SLAB_SIZE // 2 * SLAB_SIZE
        process.begin(PART_OF_WRITE)
        assert tmemd.ctl("set", str(row["guest"]), "--persistent-cap", str(half)).returncode == 0
        assert finish_under_pressure(process, other).wrong == 0
        assert process.run("check", ROUND_SECONDS).wrong == 0

        def given_back() -> bool:
            return all(row["persistent_bytes"] <= half for row in tmemd.rows())

        wait_until(given_back, "the slabs are back")
        stats = swapped.stats()
        assert stats["hswap_moved_out"] > 0
        assert stats["hswap_lost_pages"] == stats["hswap_overflow_errors"] == 0


def take_what_is_lent(other: FakeGuest) -> None:
    """Borrow until tmemd denies."""
    with contextlib.suppress(Denied):
        while True:
            other.ask(MAX_ASK)


def finish_under_pressure(process: Pager, other: FakeGuest) -> Round:
    """Borrow as another guest, repeatedly, until the round is over."""
    deadline = time.monotonic() + ROUND_SECONDS
    while not process.has_answered(0.1) and time.monotonic() < deadline:
        take_what_is_lent(other)
    return process.finish(1.0)
