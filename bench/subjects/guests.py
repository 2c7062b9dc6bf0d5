"""Mount six guests that share one machine's memory in different ways.

Every arm has the same total: six times `cache` and once `pool`. Each guest is a mount in a process of its own, over a
directory of its own. The limit is one mount over all the directories, with one cache of all the memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tools import procmem
from bench.tools.children import BenchError
from bench.tools.content import PAGE_SIZE
from bench.tools.harness import TMEMD, Mounted, tmemd, tmemfs

ARMS = ("a static", "b balloon", "b quick balloon", "c greedy", "d policy", "e shipped", "f limit")
_LENDING = {
    "c greedy": ("greedy", "--no-compress"),
    "d policy": ("mix", "--no-compress"),
    "e shipped": ("mix", "--compress"),
}


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """How a balloon follows its target: every `interval` seconds, 1/`up` or 1/`down` of the way."""

    interval: float
    up: int
    down: int


# The defaults of Linux's drivers/xen/xen-selfballoon.c, and the best that a balloon can do for short phases.
BALLOONS = {"b balloon": Hysteresis(5.0, 1, 8), "b quick balloon": Hysteresis(0.5, 1, 1)}


@dataclass(frozen=True, slots=True)
class Shape:
    """The memory of an arm, in bytes."""

    cache: int  # of each guest, its X
    pool: int  # of all together, the Y

    def total(self, guests: int) -> int:
        """Return the bytes of all guests together."""
        return guests * self.cache + self.pool


@dataclass(frozen=True, slots=True)
class Guests:
    """The mounts of an arm, and where each guest reads its files."""

    mounts: Sequence[Mounted]
    paths: Sequence[Path]

    def held(self, guest: int) -> int | None:
        """Return the bytes of files that a guest has in memory; None if the guests share one cache."""
        if len(self.mounts) == 1:
            return None
        stats = self.mounts[guest].stats()
        return int(stats["cache_resident_bytes"] + stats["pool_original_bytes"])

    def backing_pages(self) -> int:
        """Return the pages read from the slow directories."""
        return int(sum(mount.stats()["backing_pages"] for mount in self.mounts))

    def processor_seconds(self) -> float:
        """Return the processor time of the mounts."""
        return sum(procmem.run_seconds(mount.pid) for mount in self.mounts)


@contextlib.contextmanager
def sharing(arm: str, space: Path, sources: Sequence[Path], shape: Shape, throttle: str) -> Iterator[Guests]:
    """Mount all guests in one of the ARMS; the sources are in one directory."""
    places = [space / "mounts" / source.name for source in sources]
    options: tuple[str, ...] = ("--throttle", throttle, "--attr-timeout", "60s", "--negative-timeout", "60s")
    with contextlib.ExitStack() as stack:
        if arm == "f limit":
            whole = shape.total(len(sources))
            mount = stack.enter_context(tmemfs(sources[0].parent, space / "mounts", *options, cache=whole, pool=0))
            yield Guests([mount], [mount.path / source.name for source in sources])
            return
        cache, pool = shape.cache, 0
        if arm in _LENDING:
            policy, compress = _LENDING[arm]
            module = "bench.subjects.greedytmemd" if policy == "greedy" else TMEMD
            socket = stack.enter_context(tmemd(space, shape.pool, "--policy", policy, module=module)).socket
            options = (*options, "--pool", f"unix:{socket}", compress)
        else:
            cache += shape.pool // len(sources)
        mounts = [
            stack.enter_context(tmemfs(source, place, *options, cache=cache, pool=pool))
            for source, place in zip(sources, places, strict=True)
        ]
        if arm in BALLOONS:
            stack.enter_context(_ballooned(mounts, shape, BALLOONS[arm]))
        yield Guests(mounts, places)


@contextlib.contextmanager
def _ballooned(mounts: Sequence[Mounted], shape: Shape, hysteresis: Hysteresis) -> Iterator[None]:
    """Run a controller that moves memory between the caches, as a host does with a balloon in each guest."""
    over = threading.Event()
    minimum, total = shape.cache, shape.total(len(mounts))

    def control() -> None:
        sizes = [total // len(mounts)] * len(mounts)
        before = [mount.stats() for mount in mounts]
        while not over.wait(hysteresis.interval):
            now = [mount.stats() for mount in mounts]
            needs = [need(one, other, minimum) for one, other in zip(before, now, strict=True)]
            after = rebalanced(sizes, needs, total, hysteresis)
            # Shrink before growing, so that the total is never exceeded.
            for number in sorted(range(len(mounts)), key=lambda each: after[each] - sizes[each]):
                if after[number] != sizes[number]:
                    mounts[number].control("cache_size", str(after[number]))
            sizes, before = after, now

    failed: list[OSError] = []

    def try_to_control() -> None:
        try:
            control()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=try_to_control, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30.0)
    if failed:  # without the controller, the arm is a static split
        raise BenchError(f"the balloon's controller failed: {failed[0]}")


def need(before: dict[str, float], now: dict[str, float], minimum: int) -> int:
    """Return the bytes that a guest needs: what it holds and what it missed since the last look."""
    missed = now["cache_misses"] - before["cache_misses"]
    used = now["demand_pages"] - before["demand_pages"]
    return max(minimum, int(now["cache_resident_bytes"] + PAGE_SIZE * missed)) if used > 100 else minimum


def rebalanced(sizes: Sequence[int], needs: Sequence[int], total: int, hysteresis: Hysteresis) -> list[int]:
    """Return the sizes after one look: a part of each surplus is given up; guests that lack share what is free."""
    after = [size - max(0, size - wanted) // hysteresis.down for size, wanted in zip(sizes, needs, strict=True)]
    lacks = [max(0, wanted - size) // hysteresis.up for size, wanted in zip(after, needs, strict=True)]
    free = total - sum(after)
    share = min(1.0, free / sum(lacks)) if sum(lacks) else 0.0
    return [size + int(lack * share) for size, lack in zip(after, lacks, strict=True)]


class Watching:
    """A context manager that samples what busy guests hold in memory."""

    def __init__(self, guests: Guests, busy: Sequence[int], every: float = 0.2) -> None:
        self._guests, self._busy, self._every = guests, busy, every
        self._over = threading.Event()
        self.seen: dict[int, list[tuple[float, int]]] = {guest: [] for guest in busy}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watching:
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._over.set()
        self._thread.join(30.0)

    def _watch(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._every):
            for guest in self._busy:
                held = self._guests.held(guest)
                if held is not None:
                    self.seen[guest].append((time.monotonic() - began, held))

    def seconds_until(self, size: int) -> list[float | None]:
        """Return for each guest the seconds until it held `size` bytes; None if it never did."""
        return [next((at for at, held in self.seen[guest] if held >= size), None) for guest in self._busy]

    def max_held(self) -> list[int]:
        """Return the most bytes that each guest held."""
        return [max((held for _, held in self.seen[guest]), default=0) for guest in self._busy]
