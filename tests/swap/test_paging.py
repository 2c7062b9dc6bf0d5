"""A process with a quarter of the memory it needs swaps to a mount, and never reads a wrong byte."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from bench.subjects.paging import Pager, pager, vmstat
from bench.tools.memcg import join, limited, set_limit
from tests.conftest import wait_until
from tests.swap.swapped import LIMIT, MIB, PAGES, ROUND_SECONDS, WORKING_SET, SwappedMount
from tmemcommon.headroom import CGROUP_RESERVE
from tmemfs.guest import REQUEST_BUFFER_BYTES

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.timeout(900)]


def rounds(process: Pager, *verbs: str) -> None:
    """Write or check all pages, and assert that none is wrong."""
    for verb in verbs:
        assert process.run(verb, ROUND_SECONDS).wrong == 0


def test_a_pool_that_is_large_enough_holds_every_page(swapped: SwappedMount, cgroup_version: int) -> None:
    swapped.start("--pool", "64M")
    before = vmstat()
    with limited(LIMIT, cgroup_version) as cgroup, pager(cgroup, WORKING_SET) as process:
        rounds(process, "write", "check", "write", "check")
        stats = swapped.stats()
    paged = {name: value - before[name] for name, value in vmstat().items()}
    least = (WORKING_SET - LIMIT) // 4096  # of every round over all pages
    assert paged["pswpout"] >= 2 * least
    assert paged["pswpin"] >= 2 * least
    assert stats["hswap_puts"] >= 2 * least
    assert stats["hswap_gets"] >= 2 * least
    assert stats["hswap_pool_pages"] >= least
    assert stats["hswap_rejected_puts"] == stats["hswap_overflow_pages"] == 0
    assert stats["pool_compression_ratio"] > 1.5


def test_the_memory_of_the_pool_is_locked(swapped: SwappedMount) -> None:
    swapped.start("--pool", "8M", swap=False)
    process = swapped.mounted.process
    assert process is not None
    (swapped.mounted.source / "file").write_bytes(random.Random(1).randbytes(2 * MIB))
    (swapped.mounted.root / "file").read_bytes()  # more than the cache: some of it goes into the pool
    fd = os.open(swapped.file, os.O_RDWR)
    os.pwrite(fd, random.Random(2).randbytes(2 * MIB), 0)
    os.pwrite(fd, bytes(MIB // 2), 0)
    os.close(fd)
    assert swapped.stats()["pool_lent_bytes"] >= 2 * MIB

    def all_of_it_is_locked() -> bool:
        stats = swapped.stats()
        return bool(locked_bytes(process.pid, "tmem-arena") == stats["pool_lent_bytes"] + stats["pool_stock_bytes"])

    wait_until(all_of_it_is_locked, "all that is lent, or ready to be, is locked")


def locked_bytes(pid: int, name: str) -> int:
    """Return the locked bytes of the mappings of a file."""
    total, within = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            within = name in line
        elif within and line.startswith("Locked:"):
            total += int(line.split()[1]) << 10
    return total


def test_a_pool_that_is_too_small_lets_the_rest_overflow(swapped: SwappedMount, cgroup_version: int) -> None:
    swapped.start("--pool", "24M")
    with limited(LIMIT, cgroup_version) as cgroup, pager(cgroup, WORKING_SET) as process:
        rounds(process, "write", "check", "write", "check")
        stats = swapped.stats()
    assert stats["hswap_pool_pages"] > PAGES // 4
    assert stats["hswap_overflow_pages"] > PAGES // 8
    assert stats["hswap_rejected_puts"] > PAGES // 8
    assert stats["hswap_overflow_errors"] == stats["hswap_lost_pages"] == 0


@pytest.mark.slow
def test_a_guest_at_its_cgroup_limit_overflows_the_rest(swapped: SwappedMount, cgroup_version: int) -> None:
    """The guest's memory is locked, so at the limit the kernel could only kill the guest."""
    swapped.start("--pool", "64M")
    process = swapped.mounted.process
    assert process is not None
    with limited(LIMIT + CGROUP_RESERVE + REQUEST_BUFFER_BYTES, cgroup_version) as own:
        join(own, process.pid)
        try:
            with limited(LIMIT, cgroup_version) as cgroup, pager(cgroup, WORKING_SET) as paging:
                rounds(paging, "write", "check", "write")
                stats = swapped.stats()
            assert stats["hswap_overflow_pages"] > PAGES // 8
            assert stats["hswap_overflow_errors"] == stats["hswap_lost_pages"] == 0
            assert MIB < stats["pool_lent_bytes"] < LIMIT
        finally:
            set_limit(own, cgroup_version, 16 * WORKING_SET)
            swapped.end()


@pytest.mark.slow
def test_two_processes_page_at_once(swapped: SwappedMount, cgroup_version: int) -> None:
    swapped.start("--pool", "16M")
    with (
        limited(LIMIT, cgroup_version) as cgroup,
        limited(LIMIT, cgroup_version) as other,
        pager(cgroup, WORKING_SET // 2, seed=1) as one,
        pager(other, WORKING_SET // 2, seed=2) as two,
    ):
        for verb in ("write", "check", "write", "check"):
            for process in (one, two):
                process.begin(verb)
            for process in (one, two):
                assert process.finish(ROUND_SECONDS).wrong == 0
        assert swapped.stats()["hswap_puts"] >= 2 * (WORKING_SET - 2 * LIMIT) // 4096


def test_swapoff_reads_all_pages_of_a_process_back(swapped: SwappedMount, cgroup_version: int) -> None:
    swapped.start("--pool", "4M")
    with limited(LIMIT, cgroup_version) as cgroup, pager(cgroup, WORKING_SET) as process:
        rounds(process, "write")
        assert swapped.stats()["hswap_overflow_pages"] > 0
        set_limit(cgroup, cgroup_version, 4 * WORKING_SET)
        done = swapped.command("swapoff")
        assert done.returncode == 0, done.stderr
        rounds(process, "check")
        stats = swapped.stats()
    assert stats["hswap_pool_pages"] == stats["hswap_overflow_pages"] == stats["pool_pages"] == 0


def test_a_signal_to_the_guest_swaps_off_first(swapped: SwappedMount, cgroup_version: int) -> None:
    swapped.start("--pool", "4M")
    with limited(LIMIT, cgroup_version) as cgroup, pager(cgroup, WORKING_SET) as process:
        rounds(process, "write")
        set_limit(cgroup, cgroup_version, 4 * WORKING_SET)
        swapped.end_by_signal()
        rounds(process, "check")
