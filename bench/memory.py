"""Measure the memory that a mount takes, against its capacity and against its own counters.

Memory is the proportional set size of the process plus the blocks of its arena (bench/tools/procmem.py), less that of
an idle mount with the same options. Cache and pool are full of 2:1 compressible pages. It is divided by their
capacity. The counters are compared with it: `pool_lent_bytes` with the arena's blocks; `pool_lent_bytes`, the cache and
`pool_index_bytes` together with the growth of the process. The pages of a mapped file in the kernel's page cache
(mincore) are reported; no counter shows them.

Then the cache is resized from 256M to 16M, with a full pool, so that the pages cannot move there.

    python -m bench.memory [--cache 64] [--pool 256] [--big 256] [--small 16] [--out FILE]
"""

from __future__ import annotations

import time
from pathlib import Path

from bench.tools import pages, procmem
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, tmemfs, workspace
from bench.tools.procmem import Memory
from bench.tools.report import Figures, Goal, Outcome, main, parser, say
from bench.tools.verdict import judged

SLABS_GOAL, WHOLE_GOAL = 2.0, 10.0  # percent
FULL_GOAL, FALL_GOAL = 1.1, 200 * MIB
FALL_SHARE = FALL_GOAL / (240 * MIB)  # of the cache's fall, for other sizes
FILL_PASSES, FILL_BLOCK = 6, 16 * PAGE_SIZE
SETTLE_SECONDS = 20.0


def measure(cache: int = 64 * MIB, pool: int = 256 * MIB, big: int = 256 * MIB, small: int = 16 * MIB) -> Outcome:
    """Measure a full mount, then a shrinking one."""
    with workspace() as space:
        source = space / "source"
        source.mkdir()
        resize_pool = max(MIB, pool // 8)
        size = max(cache + 2 * pool, big + 2 * resize_pool)
        write_half_compressible(source / "file", int(size * 1.1) // PAGE_SIZE)
        full, full_goals = _full(source, space / "full", cache, pool)
        fall, fall_goal = _resize(source, space / "resize", big, small, resize_pool)
    return Outcome([*full_goals, fall_goal], {"full": full, "resize": fall})


def _full(source: Path, mountpoint: Path, cache: int, pool: int) -> tuple[Figures, list[Goal]]:
    """Fill cache and pool and compare with the same mount before that."""
    with tmemfs(source, mountpoint, cache=cache, pool=pool) as mount:
        _use_a_little(mount)
        idle = procmem.of(mount.pid)
        _fill(mount)
        full = procmem.of(mount.pid)
        stats = mount.stats()
        mapped = _mapped(mount, min(cache, 16 * MIB))
    ratio = (full.total - idle.total) / (cache + pool)
    say(f"  idle {idle.total / MIB:.1f} MiB, full {full.total / MIB:.1f} MiB, capacity {(cache + pool) / MIB:.0f} MiB")
    index = stats["pool_index_bytes"]
    say(f"  {ratio:.3f} × the capacity; the index says that it takes {index / MIB:.1f} MiB")
    counted = stats["cache_resident_bytes"] + stats["pool_lent_bytes"] + index
    honesty = {
        "slabs": {"counters": stats["pool_lent_bytes"], "measured": full.memfd},
        "cache, slabs and index": {"counters": counted, "measured": full.total - idle.total},
    }
    for name, sides in honesty.items():
        say(f"  {name}: " + ", ".join(f"{side} {value / MIB:.1f} MiB" for side, value in sides.items()))
    say(f"  a mapped file in the kernel's page cache: {mapped / MIB:.1f} MiB")
    names = ("pool_pages", "pool_lent_bytes", "pool_used_bytes", "pool_compression_ratio", "pool_index_bytes")
    figures: Figures = {
        "cache_bytes": cache,
        "pool_bytes": pool,
        "idle": _plain(idle),
        "full": _plain(full),
        "ratio": ratio,
        "honesty": honesty,
        "mapped_bytes": mapped,
        "stats": {name: stats[name] for name in ("cache_resident_bytes", *names)},
    }
    what = "process memory (PSS and arena) over an idle mount's, cache and pool full of 2:1 pages"
    goals = [Goal(what, f"≤ {FULL_GOAL} × capacity", f"{ratio:.2f} × capacity", judged(ratio <= FULL_GOAL))]
    for (name, sides), limit in zip(honesty.items(), (SLABS_GOAL, WHOLE_GOAL), strict=True):
        off = 100.0 * (sides["measured"] / sides["counters"] - 1.0)
        text = f"memory that is really taken against what the counters say: {name}"
        goals.append(Goal(text, f"within {limit:.0f} %", f"{off:+.1f} %", judged(abs(off) <= limit)))
    return figures, goals


def _mapped(mount: Mounted, size: int) -> int:
    """Read a file through a mapping; return its bytes in the kernel's page cache."""
    with open(mount.path / "file", "rb") as file:
        return procmem.in_page_cache(file.fileno(), size, touch=True)


def _resize(source: Path, mountpoint: Path, big: int, small: int, pool: int) -> tuple[Figures, Goal]:
    """Fill cache and pool, then make the cache smaller."""
    with tmemfs(source, mountpoint, cache=big, pool=pool) as mount:
        _fill(mount)
        before = procmem.of(mount.pid)
        mount.control("cache_size", str(small))
        _wait_for_resident(mount, small)
        after = procmem.of(mount.pid)
    fall = before.total - after.total
    say(f"  before the resize {before.total / MIB:.1f} MiB, after it {after.total / MIB:.1f} MiB")
    figures: Figures = {
        "big_bytes": big,
        "small_bytes": small,
        "pool_bytes": pool,
        "before": _plain(before),
        "after": _plain(after),
        "fall_bytes": fall,
    }
    goal_fall = FALL_SHARE * (big - small)
    what = f"memory after resize from {big // MIB}M to {small // MIB}M, the pool full before"
    goal = Goal(what, f"falls ≥ {goal_fall / MIB:.0f} MiB", f"falls {fall / MIB:.0f} MiB", judged(fall >= goal_fall))
    return figures, goal


def _use_a_little(mount: Mounted) -> None:
    """Read one page, so that an idle mount has opened a file."""
    with open(mount.path / "file", "rb", buffering=0) as file:
        file.read(PAGE_SIZE)


def _fill(mount: Mounted) -> None:
    """Read until the cache is full and the pool evicts.

    In blocks in random order: pages of a scan arrive faster than they are compressed, and are dropped.
    """
    file = mount.path / "file"
    order = shuffled(file.stat().st_size // FILL_BLOCK, seed=7)
    for _ in range(FILL_PASSES):
        pages.in_order(file, order, FILL_BLOCK)
        stats = mount.stats()
        if stats["pool_evictions"] and stats["cache_resident_bytes"] > 0.9 * stats["cache_capacity_bytes"]:
            return
    raise BenchError("cache and pool did not become full")


def _wait_for_resident(mount: Mounted, size: int) -> None:
    limit = time.monotonic() + SETTLE_SECONDS
    while mount.stats()["cache_resident_bytes"] > size:
        if time.monotonic() > limit:
            raise BenchError("the cache did not shrink")
        time.sleep(0.05)


def _plain(memory: Memory) -> dict[str, int]:
    return {"pss_bytes": memory.pss, "memfd_bytes": memory.memfd, "total_bytes": memory.total}


if __name__ == "__main__":
    command = parser(__doc__)
    for name, default in (("cache", 64), ("pool", 256), ("big", 256), ("small", 16)):
        command.add_argument(f"--{name}", type=int, default=default, help="MiB")
    asked = command.parse_args()
    sizes = [value * MIB for value in (asked.cache, asked.pool, asked.big, asked.small)]
    main(asked, lambda: measure(*sizes))
