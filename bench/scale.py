"""Measure what tmemd costs for each guest and each slab, and while 64 guests hit, against a goal for the last.

Guests have no pool (bench/subjects/syncguest.py), so only tmemd is measured. For 1 to 64 guests and arenas of 64 MiB to
16 GiB: the memory (proportional set size) of tmemd and its workers before the guests join, with them, and with
everything lent in scattered slabs; and their processor time a slab that is lent and returned. Then their share of a
core while 64 guests only send a Report each 0.9 s, as busy mounts do: the median of these periods with its interval
(bench/tools/verdict.py).

    python -m bench.scale [--slabs 20000] [--quiet 20] [--out FILE]
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.subjects.syncguest import SyncGuest
from bench.tools import procmem
from bench.tools.content import MIB
from bench.tools.harness import Lending, tmemd, workspace
from bench.tools.report import Figures, Goal, Outcome, main, parser, say
from bench.tools.verdict import spread
from tmem.arena import SLAB_SIZE
from tmem.lending.protocol import messages as m

GUESTS = (1, 4, 16, 64)
ARENAS = tuple(size * MIB for size in (64, 1024, 16384))
LENT = 64 * MIB  # together, before half of it is returned
QUIET_GUESTS, REPORT_SECONDS, QUIET_GOAL = 64, 0.9, 1  # s; percent
ASK = 16


def measure(
    slabs: int = 20000, quiet: float = 20.0, guests: Sequence[int] = GUESTS, arenas: Sequence[int] = ARENAS
) -> Outcome:
    """Measure the costs by number of guests and by arena, and the load of guests that only report."""
    by_guests = [_costs(number, 256 * MIB, slabs) for number in guests]
    by_arena = [_costs(4, arena, slabs) for arena in arenas]
    shares = _quiet(quiet)
    share, many = spread([100 * one for one in shares]), by_guests[-1]
    of_one = f"{many['cpu_seconds_a_slab'] * 1e6:.1f} µs of tmemd"
    what = f"tmemd while {QUIET_GUESTS} guests hit"
    goals = [
        Goal(what, f"≤ {QUIET_GOAL} % of a core", share.text(".2f", " %"), share.at_most(QUIET_GOAL)),
        Goal(f"a slab lent and returned, {guests[-1]} guests", "–", of_one),
        Goal(f"tmemd's memory for a guest, {guests[-1]} guests", "–", f"{many['bytes_a_guest'] / 1024:.0f} KiB"),
        Goal(f"tmemd's memory for a lent slab, {guests[-1]} guests", "–", f"{many['bytes_a_slab']:.0f} bytes"),
    ]
    figures: Figures = {"by_guests": by_guests, "by_arena": by_arena, "quiet_shares_of_a_core": shares}
    return Outcome(goals, figures)


def _costs(guests: int, arena: int, slabs: int) -> dict[str, float]:
    """Measure one tmemd with `guests` guests of `arena` bytes; about `slabs` slabs are lent and returned."""
    with _lending(guests, arena, LENT) as (lending, borrowers, before):
        joined = _memory(lending.pid)
        for guest in borrowers:
            _lend_in_pieces(guest, LENT // SLAB_SIZE // guests)
        lent = sum(len(guest.held) for guest in borrowers)
        full = _memory(lending.pid)
        began, turns = _seconds(lending.pid), max(1, slabs // (ASK * guests))
        moved = 0
        for _ in range(turns):
            for guest in borrowers:
                moved += _turn_over(guest)
        spent = _seconds(lending.pid) - began
    costs = {
        "guests": guests,
        "arena_bytes": arena,
        "idle_bytes": before,
        "bytes_a_guest": (joined - before) / guests,
        "bytes_a_slab": max(0, full - joined) / lent,
        "cpu_seconds_a_slab": spent / moved,
    }
    say(
        f"  {guests:>2} guests of {arena // MIB:>5} MiB: {costs['bytes_a_guest'] / 1024:6.1f} KiB a guest,"
        f" {costs['bytes_a_slab']:5.1f} bytes and {costs['cpu_seconds_a_slab'] * 1e6:5.1f} µs a slab"
    )
    return costs


@contextlib.contextmanager
def _lending(guests: int, arena: int, size: int) -> Iterator[tuple[Lending, Sequence[SyncGuest], int]]:
    """Yield a tmemd, its guests, and its memory before they joined."""
    with workspace() as space, tmemd(space, size) as lending:
        # The first guest makes Python load modules and allocate; no later guest does.
        _warm(lending.socket)
        before = _memory(lending.pid)
        borrowers = [SyncGuest(lending.socket, arena // SLAB_SIZE, f"/mnt/{number}").join() for number in range(guests)]
        try:
            yield lending, borrowers, before
        finally:
            for guest in borrowers:
                guest.close()


def _memory(pid: int) -> int:
    """Return the memory of a tmemd and its workers."""
    return sum(procmem.of(one).pss for one in procmem.family(pid))


def _seconds(pid: int) -> float:
    """Return the processor time of the first threads of a tmemd and its workers, which do all the work."""
    return sum(map(procmem.main_thread_seconds, procmem.family(pid)))


def _warm(path: Path) -> None:
    guest = SyncGuest(path, 256, "/warm").join()
    for _ in range(4):
        _turn_over(guest)
    guest.close()


def _lend_in_pieces(guest: SyncGuest, slabs: int) -> None:
    """Lend a guest `slabs` slabs, then return every other one, so that no two are adjacent."""
    while len(guest.held) < slabs:
        guest.ask(min(ASK, slabs - len(guest.held)))
    guest.give({slab for slab in guest.held if slab % 2})


def _turn_over(guest: SyncGuest) -> int:
    """Return a batch of slabs, borrow one, and return how many slabs were lent."""
    guest.give(set(sorted(guest.held)[:ASK]))
    return len(guest.ask(ASK))


def _quiet(seconds: float) -> list[float]:
    """Return the share of a core that tmemd takes in each period while guests only report."""
    with _lending(QUIET_GUESTS, 256 * MIB, LENT) as (lending, borrowers, _):
        for guest in borrowers:
            guest.ask(ASK)
        shares: list[float] = []
        for turn in range(1, 1 + max(1, round(seconds / REPORT_SECONDS))):
            began, spent = time.monotonic(), _seconds(lending.pid)
            for number, guest in enumerate(borrowers):
                guest.send(m.Report(1.0, 100, 1 << 20, 100 * turn, 90 * turn, 10 * turn, number))
            time.sleep(REPORT_SECONDS - time.monotonic() % REPORT_SECONDS)  # the ticks of mounts are in step, too
            shares.append((_seconds(lending.pid) - spent) / (time.monotonic() - began))
        return shares[1:] or shares  # the first period began between two ticks


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--slabs", type=int, default=20000, help="to lend and take back at each point")
    command.add_argument("--quiet", type=float, default=20.0, help="seconds")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.slabs, asked.quiet))
