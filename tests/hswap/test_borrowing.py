"""A swap-like file in borrowed memory: slabs are returned without losing a page, and borrowed again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.conftest import Place, wait_until
from tests.lending.conftest import tmemd
from tests.lending.tmemd import Tmemd
from tests.mounted import Mounted

__all__ = ["tmemd"]

pytestmark = [pytest.mark.mount, pytest.mark.timeout(500)]
PAGE = 4096
MIB = 1 << 20
PAGES = 512
PATIENCE = 100.0  # seconds: tmemd, the mount and the test share the machine with others
CONTENT = random.Random(1).randbytes(PAGES * PAGE)


class Loan:
    """A mount that borrows from a tmemd, and its open hswap file."""

    def __init__(self, mounted: Mounted, daemon: Tmemd) -> None:
        self.mounted = mounted
        self.daemon = daemon
        self.fd = os.open(mounted.root / ".tmemfs" / "hswap", os.O_RDWR)

    def fill(self) -> None:
        """Write all pages and wait until they are in the pool; the first ones come before anything is lent."""
        os.pwrite(self.fd, CONTENT, 0)
        self.read_until_in_pool()

    def read_until_in_pool(self) -> None:
        """Read everything repeatedly until it has moved back to the pool."""

        def come_back() -> bool:
            self.verify()
            return self.stat("hswap_pool_pages") == PAGES

        wait_until(come_back, "every page is in the pool", PATIENCE)
        assert self.stat("hswap_overflow_pages") == 0

    def verify(self) -> None:
        """Read everything and compare it."""
        assert os.pread(self.fd, len(CONTENT), 0) == CONTENT

    def stat(self, name: str) -> int:
        """Read one counter."""
        return int(self.mounted.stats()[name])

    def rest(self) -> None:
        """Wait until every borrowed slab is in use, so that no slab is borrowed or returned any more."""

        def at_rest() -> bool:
            stats = self.mounted.stats()
            all_heard = stats["lender_asks"] == self.daemon.totals()["asks"]
            return bool(all_heard and stats["lender_held_bytes"] == stats["pool_lent_bytes"] == self.persistent_bytes())

        wait_until(at_rest, "what is not used has been returned", PATIENCE)

    def persistent_bytes(self) -> int:
        """Return how much tmemd has lent for the file."""
        return int(self.daemon.rows()[0]["persistent_bytes"])

    def ctl(self, *words: str) -> None:
        """Run tmemctl."""
        done = self.daemon.ctl(*words)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def loan(place: Place, tmemd: Tmemd) -> Iterator[Loan]:
    """Return a mount with a swap-like file of 2 MiB, which borrows from a tmemd of 16 MiB."""
    mounted = Mounted(place)
    mounted.patience = 400.0
    overflow = place.log.with_name("overflow")
    try:
        tmemd.start("16M")
        mounted.start("--hswap", str(len(CONTENT)), "--hswap-overflow", str(overflow), "--pool", f"unix:{tmemd.socket}")
        made = Loan(mounted, tmemd)
        try:
            yield made
        finally:
            os.close(made.fd)
        mounted.end()
    finally:
        mounted.stop_watchdog()


def test_the_persistent_cap_moves_the_coldest_pages_out_and_back(loan: Loan) -> None:
    loan.fill()
    hot = range(64)
    for _ in range(3):
        for page in hot:
            assert os.pread(loan.fd, PAGE, page * PAGE) == CONTENT[page * PAGE : (page + 1) * PAGE]
    loan.ctl("set", "1", "--persistent-cap", "1M")
    wait_until(lambda: loan.persistent_bytes() <= MIB, "the slabs are back", PATIENCE)
    assert loan.stat("hswap_moved_out") >= PAGES // 2 - 16
    stats = loan.mounted.stats()
    assert stats["hswap_pool_pages"] + stats["hswap_overflow_pages"] == PAGES
    reads = loan.stat("hswap_overflow_reads")
    assert os.pread(loan.fd, 64 * PAGE, 0) == CONTENT[: 64 * PAGE]
    assert loan.stat("hswap_overflow_reads") == reads, "what was read often has stayed"
    loan.verify()
    loan.ctl("set", "1", "--persistent-cap", "4M")
    loan.read_until_in_pool()
    assert loan.stat("hswap_moved_in") >= PAGES // 2 - 16
    assert loan.stat("hswap_lost_pages") == 0


def test_revoked_persistent_memory_is_returned_without_losing_a_page(loan: Loan) -> None:
    loan.fill()
    loan.rest()
    loan.ctl("revoke", "1", str(loan.persistent_bytes() - MIB), "--persistent")
    wait_until(lambda: loan.persistent_bytes() <= MIB, "all but a MiB is back", PATIENCE)
    assert loan.stat("hswap_moved_out") >= PAGES // 2 - 16
    loan.verify()
    assert loan.stat("hswap_lost_pages") == 0


def test_a_persistent_cap_of_zero_moves_everything_out(loan: Loan) -> None:
    loan.fill()
    loan.ctl("set", "1", "--persistent-cap", "0")
    wait_until(lambda: loan.persistent_bytes() == 0, "all of it is back", PATIENCE)
    assert loan.stat("hswap_overflow_pages") == PAGES
    os.pwrite(loan.fd, CONTENT, 0)
    loan.verify()
    assert loan.stat("hswap_overflow_pages") == PAGES


def test_nothing_is_lost_when_tmemd_is_killed_and_started_again(loan: Loan) -> None:
    loan.fill()
    loan.daemon.kill()
    wait_until(lambda: loan.mounted.stats()["lender"] == "disconnected", "the guest has noticed", PATIENCE)
    loan.verify()
    os.pwrite(loan.fd, CONTENT[:MIB], 0)
    loan.verify()
    loan.daemon.start("16M")
    wait_until(lambda: loan.mounted.stats()["lender"] == "connected", "the guest has registered again", PATIENCE)
    loan.verify()
    wait_until(lambda: loan.persistent_bytes() >= PAGES * PAGE, "what it holds is in the new ledger", PATIENCE)


def test_writes_to_a_frozen_pool_go_to_the_overflow_file(loan: Loan) -> None:
    loan.fill()
    loan.ctl("freeze", "1")
    wait_until(
        lambda: loan.mounted.root.joinpath(".tmemfs/freeze").read_text() == "1\n", "the pool is frozen", PATIENCE
    )
    os.pwrite(loan.fd, CONTENT[: 64 * PAGE], 0)
    assert loan.stat("hswap_overflow_pages") == 64
    assert loan.stat("hswap_pool_pages") == PAGES - 64
    loan.verify()
    loan.ctl("thaw", "1")
    loan.read_until_in_pool()
