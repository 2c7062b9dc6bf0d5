"""A frozen pool refuses puts and serves gets."""

from __future__ import annotations

import pytest

from tests.calls import code_of
from tests.conftest import REAL, run
from tests.mounted import Mounted
from tests.pagebytes import pages_of

pytestmark = pytest.mark.mount


def test_a_frozen_pool_refuses_puts_and_serves_gets(mounted: Mounted) -> None:
    for name in ("old", "new"):
        (mounted.source / name).write_bytes(pages_of(len(name), 400))
    root = mounted.start()

    def read_and_shrink(name: str) -> None:
        mounted.control("cache_size", "4M")
        assert (root / name).read_bytes() == (mounted.source / name).read_bytes()
        mounted.control("cache_size", "1M")  # pages that no longer fit go into the pool

    read_and_shrink("old")
    assert mounted.stats()["pool_pages"] >= 100
    mounted.control("freeze", "1\n")
    assert (root / ".tmemfs" / "freeze").read_text() == "1\n"
    frozen = mounted.stats()
    assert frozen["pool_frozen"] == 1
    read_and_shrink("new")
    read_and_shrink("old")
    after = mounted.stats()
    assert after["precache_succ_gets"] > 0
    assert after["precache_rejected_puts"] > frozen["precache_rejected_puts"]
    assert after["pool_pages"] <= frozen["pool_pages"] - after["precache_succ_gets"]
    mounted.control("freeze", "0")
    assert mounted.stats()["pool_frozen"] == 0
    read_and_shrink("new")
    assert mounted.stats()["pool_pages"] > after["pool_pages"]


def test_a_mount_without_a_pool_has_nothing_to_freeze(mounted: Mounted) -> None:
    root = mounted.start("--pool", "none")
    assert code_of(lambda: mounted.control("freeze", "1")) == "EINVAL"
    assert (root / ".tmemfs" / "freeze").read_text() == "0\n"
    assert mounted.stats()["pool_frozen"] == 0


def test_freeze_and_thaw_work_and_report_a_missing_pool(mounted: Mounted) -> None:
    root = mounted.start()
    for command, state in (("freeze", "1\n"), ("thaw", "0\n")):
        done = run(*REAL, command, root)
        assert (done.returncode, done.stderr) == (0, "")
        assert (root / ".tmemfs" / "freeze").read_text() == state
    mounted.end()
    mounted.start("--pool", "none")
    done = run(*REAL, "freeze", root)
    assert done.returncode == 2
    assert "has no pool to freeze: mount it with --pool SIZE" in done.stderr
    assert done.stderr.count("\n") == 1
