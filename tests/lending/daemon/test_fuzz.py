"""Anything may come over tmemd's socket: it goes on, its ledger stays right, and an honest guest is served."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.lending.conftest import MakeGuest
from tests.lending.daemon.fuzzer import Fuzzer
from tests.lending.tmemd import Tmemd


def fuzz(tmemd: Tmemd, guest: MakeGuest, frames: int, seed: int, waits: Sequence[float] = (0.001, 0.05)) -> None:
    """Send so many frames of any kind; what an honest guest holds persistently is not touched."""
    tmemd.start("16M")
    honest = guest(name="/mnt/honest", persistent=8).join()
    kept = honest.ask_until(8, persistent=True)
    for slab in kept:
        honest.write(slab, b"kept %d" % slab)
    fuzzer = Fuzzer(tmemd.socket, seed, waits)
    try:
        while fuzzer.sent < frames:
            fuzzer.connection()
            assert tmemd.process is not None
            assert tmemd.process.poll() is None, tmemd.log_text()[-4000:]
    finally:
        fuzzer.close()
    honest.settle()
    honest.answer_revokes()
    assert tmemd.ctl("thaw").returncode == 0
    assert tmemd.ctl("resize", "16M").returncode == 0
    assert all(honest.read(slab, 20).startswith(b"kept %d" % slab) for slab in honest.persistent)
    newcomer = guest(name="/mnt/new").join()
    assert newcomer.ask_until(4)
    totals = tmemd.totals()
    assert totals["cut_off_malformed"] + totals["cut_off_faulty"] > 0
    assert totals["guests_refused"] > 0


def test_any_frames_in_any_order_are_survived(tmemd: Tmemd, guest: MakeGuest) -> None:
    fuzz(tmemd, guest, 6_000, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_frames_are_survived(tmemd: Tmemd, guest: MakeGuest) -> None:
    fuzz(tmemd, guest, 1_000_000, seed=6, waits=(0.0,) * 50 + (0.01,))
