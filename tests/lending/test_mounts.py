"""Mounts that borrow: memory moves to the mount that needs it, and every byte read is right."""

from __future__ import annotations

import os
import signal

import pytest

from bench.tools.memcg import VERSIONS, join, limited
from tests.conftest import Place, wait_until
from tests.lending.conftest import MakeBorrowing
from tests.lending.mounts import MIB, SLAB, Load
from tests.lending.tmemd import Tmemd

pytestmark = pytest.mark.mount


def test_a_mount_borrows_what_it_needs_and_returns_what_it_does_not(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("16M")
    one = borrowing("one")
    one.start()
    one.read_until(lambda: one.stats()["precache_succ_gets"] > 2048, "pages come from the borrowed pool")
    stats = one.stats()
    assert stats["lender"] == "connected"
    assert 0 < stats["pool_used_bytes"] <= stats["pool_lent_bytes"] <= stats["lender_held_bytes"] <= 16 * MIB
    one.wait_agreed()
    one.mounted.control("drop_caches", "1\n")
    wait_until(lambda: tmemd.totals()["ephemeral_bytes"] == 0, "unused memory is returned")
    one.wait_agreed()
    one.end()
    wait_until(lambda: tmemd.totals()["guests"] == 0, "an ended mount is forgotten")


def test_a_mount_without_a_tmemd_fails_at_once_and_says_what_to_do(place: Place) -> None:
    socket = place.source.parent / "nobody.sock"
    done = place.mount("--pool", f"unix:{socket}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"'unix:{socket}'" in done.stderr
    assert "--pool SIZE" in done.stderr
    assert not place.is_mounted()
    done = place.mount("--pool", "8M", "--pool-max", "4M")
    assert done.returncode == 2
    assert "--pool-max" in done.stderr


def test_a_mount_does_not_use_a_socket_whose_place_others_can_take(tmemd: Tmemd, place: Place) -> None:
    tmemd.start("16M")
    tmemd.directory.chmod(0o1777)
    done = place.mount("--pool", f"unix:{tmemd.socket}")
    tmemd.directory.chmod(0o755)
    assert done.returncode == 2
    assert "take the socket's place" in done.stderr
    assert tmemd.totals()["joins"] == 0


def test_a_background_mount_has_found_tmemd_when_it_reports_success(tmemd: Tmemd, place: Place) -> None:
    tmemd.start("16M")
    assert place.mount("--pool", f"unix:{tmemd.socket}", "--pool-max", "1M").returncode == 0
    (row,) = tmemd.rows()
    assert row["name"] == os.fspath(place.mountpoint)
    assert row["arena_bytes"] == MIB


def test_what_one_mount_does_not_use_is_there_for_another(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("3M")
    idle, busy = borrowing("idle", 6), borrowing("busy", 6)
    idle.start()
    busy.start()
    idle.read_until(lambda: idle.stats()["lender_held_bytes"] >= 2 * MIB, "the idle mount has most of the memory")
    busy.read_until(lambda: busy.stats()["lender_held_bytes"] >= 2 * MIB, "the busy mount has the idle one's memory")
    # What it did not give in time was taken, and it hears of that later.
    wait_until(lambda: idle.stats()["lender_held_bytes"] <= MIB, "the idle mount knows what it has lost")
    assert idle.stats()["cache_capacity_bytes"] == MIB, "no balloon had to give it back"
    for guest in (idle, busy):
        guest.read(9)
        guest.wait_agreed()


def test_revocation_under_load_gives_nobody_a_wrong_byte(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("2M")
    guests = [borrowing(name, 3) for name in ("one", "two")]
    for guest in guests:
        guest.start()
    with Load(*guests) as load:

        def changed_hands() -> bool:
            load.go_on()
            totals = tmemd.totals()  # on a busy machine most of it is taken: nobody answers in time there
            return bool(totals["revoked_slabs"] + totals["taken_slabs"] >= 3 * 2 * MIB // SLAB)

        wait_until(changed_hands, "all of the memory has changed hands three times")
    for guest in guests:
        guest.wait_agreed()
        stats = guest.stats()
        assert stats["lender_revoked_slabs"] + stats["lender_taken_slabs"] > 0


def test_a_stopped_mount_is_not_waited_for_and_is_right_again_by_itself(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("3M")
    stopped, other = borrowing("stopped", 5), borrowing("other", 5)
    stopped.start()
    other.start()
    stopped.read_until(lambda: stopped.stats()["lender_held_bytes"] >= 2 * MIB, "it has most of the memory")
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        other.read_until(lambda: other.stats()["lender_held_bytes"] >= 2 * MIB, "the stopped mount's memory is lent")
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    wait_until(lambda: stopped.stats()["lender_taken_slabs"] > 0, "the mount knows what was taken")
    for seed in range(2):
        stopped.read(seed)
        other.read(seed)
    assert stopped.stats()["lender"] == "connected"
    for guest in (stopped, other):
        guest.wait_agreed()


def test_a_killed_mount_leaves_its_memory_free(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("16M")
    killed = borrowing("killed")
    killed.start()
    killed.read_until(lambda: killed.stats()["lender_held_bytes"] > MIB, "the mount holds something")
    assert tmemd.totals()["ephemeral_bytes"] > 0
    process, killed.mounted.process = killed.mounted.process, None
    assert process is not None
    process.kill()
    process.wait(30)
    wait_until(lambda: tmemd.totals()["guests"] == 0, "the mount's entry is gone")
    assert tmemd.totals()["ephemeral_bytes"] == 0
    killed.clean()
    killed.start()
    killed.read()
    killed.wait_agreed()


def test_where_memory_is_short_lends_are_refused_and_the_mount_goes_on(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tmemd.start("16M", "--reserve", str(everything))
    one = borrowing("one", 2)
    one.start()
    one.read_until(lambda: one.stats()["lender_denies"] > 0, "the mount was denied")
    stats = one.stats()
    assert stats["lender_held_bytes"] == stats["pool_lent_bytes"] == 0
    assert tmemd.totals()["denied_memory"] > 0


@pytest.mark.root
def test_a_memory_cgroup_bounds_what_tmemd_lends_and_kills_nobody(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    lacking = [hierarchy.lacks() for hierarchy in VERSIONS.values()]
    if all(lacking):
        pytest.skip(f"no memory cgroup: {lacking[0]}")
    with limited(24 * MIB) as cgroup:
        tmemd.start("64M")
        join(cgroup, tmemd.pid)
        one = borrowing("one", 24)
        one.start()
        one.read_until(lambda: one.stats()["lender_denies"] > 0, "tmemd has no more memory to lend")
        assert tmemd.totals()["denied_memory"] > 0
        one.read(1)
        one.wait_agreed()
        assert one.stats()["lender_held_bytes"] < 24 * MIB
        one.end()
        tmemd.stop()


def test_tmemctl_freezes_thaws_and_bounds_a_mount(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("16M")
    one = borrowing("one")
    one.start()
    name = os.fspath(one.place.mountpoint)
    one.read()
    assert tmemd.ctl("freeze", name).returncode == 0
    wait_until(lambda: one.stats()["pool_frozen"] == 1, "the pool is frozen")
    one.read(1)
    assert tmemd.ctl("thaw", name).returncode == 0
    wait_until(lambda: one.stats()["pool_frozen"] == 0, "the pool is thawed")
    assert tmemd.ctl("set", name, "--cap", "1M").returncode == 0
    wait_until(lambda: one.stats()["lender_held_bytes"] <= MIB, "the mount holds no more than its cap")
    one.read(2)
    assert one.stats()["lender_cap_bytes"] == MIB
    assert tmemd.ctl("drain", name).returncode == 0
    wait_until(lambda: one.stats()["lender_held_bytes"] == 0, "the mount is drained")
    one.read(3)
    assert tmemd.ctl("thaw", name).returncode == 0
    one.read_until(lambda: one.stats()["lender_held_bytes"] > 0, "the mount borrows again")
    one.wait_agreed()


def test_an_evicted_mount_runs_without_a_pool_and_lost_pages_fail(tmemd: Tmemd, borrowing: MakeBorrowing) -> None:
    tmemd.start("32M")
    mount = borrowing("evicted")
    mount.start_with_hswap(2)
    mount.read_until(lambda: mount.row()["ephemeral_bytes"] > 0, "the mount holds pages")
    name = os.fspath(mount.place.mountpoint)

    def is_in_the_pool() -> bool:
        mount.read_hswap()  # pages that were written before tmemd had lent anything return to the pool
        return bool(mount.stats()["hswap_pool_pages"] == 512)

    wait_until(is_in_the_pool, "all pages are in the pool")
    refused = tmemd.ctl("evict", name)
    assert refused.returncode == 1
    assert "--yes" in refused.stderr
    mount.read_hswap()
    assert "are free again" in tmemd.ctl("evict", name, "--yes").stdout
    wait_until(lambda: mount.stats()["lender"] == "evicted", "the mount has heard of it")
    wait_until(lambda: mount.stats()["hswap_lost_pages"] == 512, "the mount knows what it has lost")
    with open(mount.place.mountpoint / ".tmemfs" / "hswap", "r+b", buffering=0) as file:
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 4096, 0)
        os.pwrite(file.fileno(), mount.data[:4096], 0)
        assert os.pread(file.fileno(), 4096, 0) == mount.data[:4096]
    mount.read()
    assert mount.stats()["lender_held_bytes"] == 0
    assert mount.row()["state"] == "evicted"
    assert "the size is 1M" in tmemd.ctl("resize", "1M").stdout
