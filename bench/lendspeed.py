"""Measure how fast memory of idle guests reaches a guest that begins to miss, against fixed goals.

All of tmemd's memory is lent to idle guests. They answer a Revoke as a mount does, or do not, as a stopped one. Then
another guest asks in batches of 64 slabs, as a mount that misses. Measured are the time from its first Ask to its first
slabs, and the bytes a second from there until it holds half of the memory. Each round starts a new tmemd. The figures
are medians of the rounds with their intervals (bench/tools/verdict.py).

    python -m bench.lendspeed [--size 512] [--guests 8] [--rounds 7] [--out FILE]
"""

from __future__ import annotations

import contextlib
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.subjects.syncguest import Denied, SyncGuest
from bench.tools.content import MIB
from bench.tools.harness import tmemd, workspace
from bench.tools.report import Figures, Goal, Outcome, main, parser, say
from bench.tools.verdict import spread
from tmem.arena import SLAB_SIZE
from tmem.lending.protocol import messages as m

FIRST_GOAL, RATE_GOAL = 50, 200  # ms; MB/s
ASK = 64  # slabs
IDLE_AGE = 600.0
_SWITCH_SECONDS = 1e-4


def measure(size: int = 512 * MIB, guests: int = 8, rounds: int = 7) -> Outcome:
    """Measure with idle guests that answer, and with some that do not."""
    figures: Figures = {"size_bytes": size, "guests": guests, "ask_slabs": ASK}
    goals = []
    for answering, kind in ((True, "guests that answer"), (False, "guests that do not answer")):
        first, rate = zip(*(_round(size, guests, answering) for _ in range(rounds)), strict=True)
        figures["answering" if answering else "silent"] = {"first_seconds": first, "bytes_a_second": rate}
        latency, speed = spread([1e3 * seconds for seconds in first]), spread([each / 1e6 for each in rate])
        say(f"  {kind}: first slabs after {latency.text('.1f', ' ms')}, then {speed.text('.0f', ' MB/s')}")
        goals += [
            Goal(
                f"first slabs from {kind}",
                f"≤ {FIRST_GOAL} ms",
                latency.text(".1f", " ms"),
                latency.at_most(FIRST_GOAL),
            ),
            Goal(f"slabs from {kind}", f"≥ {RATE_GOAL} MB/s", speed.text(".0f", " MB/s"), speed.at_least(RATE_GOAL)),
        ]
    return Outcome(goals, figures)


def _round(size: int, guests: int, answering: bool) -> tuple[float, float]:
    """Lend everything to idle guests, then borrow half of it; return latency and speed."""
    slabs = size // SLAB_SIZE
    with workspace() as space, tmemd(space, size) as lending, _idle(lending.socket, guests, slabs, answering):
        busy = SyncGuest(lending.socket, slabs, "/busy").join()
        began = time.perf_counter()
        first = 0.0
        try:
            while len(busy.held) < slabs // 2:
                with contextlib.suppress(Denied):
                    busy.ask(ASK)
                first = first or (time.perf_counter() if busy.held else 0.0)
            seconds = time.perf_counter() - first
        finally:
            busy.close()
    return first - began, len(busy.held) * SLAB_SIZE / seconds


@contextlib.contextmanager
def _idle(path: Path, guests: int, slabs: int, answering: bool) -> Iterator[None]:
    """Lend everything to idle guests; a thread answers their Revokes if `answering`."""
    idle = [SyncGuest(path, slabs, f"/idle/{number}").join() for number in range(guests)]
    for guest in idle:
        while len(guest.held) < slabs // guests:
            guest.ask(min(ASK, slabs // guests - len(guest.held)))
        guest.send(m.Report(IDLE_AGE, 1, 1, 1, 0, 0, 0))
    ended = threading.Event()
    thread = threading.Thread(target=_answer, args=(idle, ended), daemon=True)
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    if answering:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if answering:
            thread.join()
        sys.setswitchinterval(before)
        for guest in idle:
            guest.close()


def _answer(guests: list[SyncGuest], ended: threading.Event) -> None:
    """Answer Revokes until `ended` is set."""
    by_number = {guest.socket.fileno(): guest for guest in guests}
    while not ended.is_set():
        for number in select.select(list(by_number), [], [], 0.05)[0]:
            by_number[number].answer_revokes()


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--size", type=int, default=512, help="MiB")
    command.add_argument("--guests", type=int, default=8)
    command.add_argument("--rounds", type=int, default=7)
    asked = command.parse_args()
    main(asked, lambda: measure(asked.size * MIB, asked.guests, asked.rounds))
