"""After each kill of tmemd, mounts go on with what they hold, no page is lost, and the next ledger is right."""

from __future__ import annotations

import pytest

from tests.conftest import wait_until
from tests.lending.conftest import MakeBorrowing
from tests.lending.mounts import MIB, Borrowing, Load
from tests.lending.tmemd import Tmemd

pytestmark = pytest.mark.mount


def start_two(tmemd: Tmemd, borrowing: MakeBorrowing) -> list[Borrowing]:
    """Start two mounts that borrow; one of them has 1 MiB of swapped pages."""
    tmemd.start("3M")
    one, two = borrowing("one", 3), borrowing("two", 3)
    one.start_with_hswap(1)
    two.start()

    def lent_for_hswap() -> bool:
        one.read_hswap()  # repeatedly, because unused slabs are returned soon
        return bool(one.row()["persistent_bytes"] > 0)

    wait_until(lent_for_hswap, "persistent memory is lent")
    return [one, two]


def lent(tmemd: Tmemd) -> int:
    """Return the bytes that all guests hold."""
    return sum(row["ephemeral_bytes"] + row["persistent_bytes"] for row in tmemd.rows())


def kill_again_and_again(tmemd: Tmemd, guests: list[Borrowing], times: int) -> None:
    """Kill tmemd repeatedly under load; no reader stops, and each new ledger agrees with the mounts."""
    with Load(*guests) as load:
        for time in range(times):
            load.go_on()
            tmemd.kill()
            load.go_on()
            guests[0].read_hswap()
            for guest in guests:
                wait_until(lambda guest=guest: guest.stats()["lender"] == "disconnected", "it has noticed")  # type: ignore[misc]
                stats = guest.stats()
                assert stats["pool_lent_bytes"] <= stats["lender_held_bytes"]
            tmemd.start("3M")
            for guest in guests:
                guest.wait_connected()
                assert guest.stats()["lender_reconnects"] == time + 1
            load.go_on()
            wait_until(lambda: lent(tmemd) <= 3 * MIB, "the credits of the holdings file are settled")
            guests[0].read_hswap()
    for guest in guests:
        guest.wait_agreed()
        guest.read(5)
    tmemd.stop()


def test_no_reader_notices_a_killed_tmemd(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    kill_again_and_again(tmemd, start_two(tmemd, borrowing), 5)


@pytest.mark.slow
def test_no_reader_notices_a_hundred_killed_tmemds(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    guests = start_two(tmemd, borrowing)
    for guest in guests:
        guest.mounted.stop_watchdog()
    kill_again_and_again(tmemd, guests, 100)


def test_a_smaller_tmemd_takes_back_until_it_fits(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("6M")
    one = borrowing("one", 6)
    one.start()
    one.read_until(lambda: one.stats()["lender_held_bytes"] > 2 * MIB, "the mount holds more than there will be")
    tmemd.kill()
    one.read(1)
    tmemd.start("1M")
    wait_until(lambda: tmemd.totals()["ephemeral_bytes"] <= MIB, "the ledger fits")
    one.wait_connected()
    wait_until(lambda: one.stats()["lender_held_bytes"] <= MIB, "the mount has given back")
    for seed in range(2):
        one.read(seed)
    one.wait_agreed()
