"""Measure the pool without a filesystem, against zram, redis, memcached and bare lz4: speed and memory.

Every store gets the same seeded 2:1 compressible pages, one at a time, and gives them back in random order. zram uses
lz4 and O_DIRECT; redis and memcached keep 4-KiB values uncompressed and are asked on a Unix socket; bare lz4 in a loop
is the limit. All run in turn in each round; the figures are medians of the rounds. Memory a page is what the serving
process, or the device, takes more than when it was empty. A get removes the page from the pool; the others keep it.

Then the pool is filled with up to five million small pages (8:1). At each size the cost of a put, a get and a get that
fails is measured: it shows whether costs grow with the pool.

    python -m bench.poolalone [--pages 8000] [--rounds 3] [--max-pages 5000000] [--out FILE]
"""

from __future__ import annotations

import contextlib
import random
import struct
import time
from collections.abc import Callable, Sequence

from bench.subjects.stores import Lz4Store, PoolStore, Store, memcached, redis, tmem_pool, zram
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, half_compressible, shuffled
from bench.tools.harness import workspace
from bench.tools.report import Figures, Goal, Outcome, main, median, parser, say

OURS = "tmem pool"
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000, 5_000_000)
SAMPLE = 5000
_SMALL_PAGE = 640  # bytes: upper bound for an 8:1 page


def measure(count: int = 8000, rounds: int = 3, max_pages: int = 5_000_000) -> Outcome:
    """Measure all stores, then the growth."""
    figures: Figures = {"pages": count, "stores": {}, "skipped_stores": {}, "notes": []}
    with workspace() as space, contextlib.ExitStack() as stack:
        content = list(half_compressible(count, seed=8))
        stores: dict[str, Store] = {}
        arms: dict[str, Callable[[], contextlib.AbstractContextManager[Store]]] = {
            OURS: lambda: tmem_pool(count * PAGE_SIZE),
            "bare lz4": lambda: contextlib.nullcontext(Lz4Store(count)),
            "zram": lambda: zram(count),
            "redis": lambda: redis(space),
            "memcached": lambda: memcached(space, 64 + 2 * count * PAGE_SIZE // MIB),
        }
        for name, arm in arms.items():
            try:
                stores[name] = stack.enter_context(arm())
            except BenchError as error:
                figures["skipped_stores"][name] = str(error)
                figures["notes"].append(f"{name} was skipped: {error}")
                say(f"  {name}: skipped: {error}")
        figures["stores"] = _in_turn(stores, content, rounds)
    figures["growth"] = _growth(max_pages)
    return Outcome(_goals(figures), figures)


def _in_turn(stores: dict[str, Store], content: Sequence[bytes], rounds: int) -> Figures:
    """Put all pages into each store and get them back, in each round."""
    found: dict[str, dict[str, list[float]]] = {name: {"put": [], "get": []} for name in stores}
    memory: dict[str, float] = {}
    order = shuffled(len(content), seed=9)
    for number in range(rounds):
        for name, store in stores.items():
            empty = store.memory() if number == 0 else 0
            began = time.perf_counter()
            for place, page in enumerate(content):
                store.put(place, page)
            between = time.perf_counter()
            if number == 0:
                memory[name] = (store.memory() - empty) / len(content)
                between = time.perf_counter()
                began = between  # not counted: the first puts, which grow tables and processes
                for place, page in enumerate(content):
                    store.put(place, page)
                between = time.perf_counter()
            for place in order:
                if store.get(place) != content[place]:
                    raise BenchError(f"{name} gave other bytes for page {place}")
            ended = time.perf_counter()
            found[name]["put"].append(len(content) / (between - began))
            found[name]["get"].append(len(content) / (ended - between))
    result: Figures = {}
    for name, rates in found.items():
        puts, gets = median(rates["put"]), median(rates["get"])
        result[name] = {"puts_a_second": puts, "gets_a_second": gets, "bytes_a_page": memory[name], "rounds": rates}
        say(f"  {name:<10} {puts:>10,.0f} puts/s {gets:>10,.0f} gets/s {memory[name]:>8,.0f} bytes a page")
    return result


def _growth(max_pages: int) -> list[Figures]:
    """Fill a pool step by step and measure at each size."""
    found: list[Figures] = []
    sizes = [size for size in SIZES if size <= max_pages] or [max_pages]
    with tmem_pool(max(64 * MIB, sizes[-1] * _SMALL_PAGE)) as store:
        empty, filled = store.memory(), 0
        for size in sizes:
            for number in range(filled, size):
                store.put(number, small_page(number))
            filled = size
            parts = _costs(store, size)
            costs = {name: median(values) for name, values in parts.items()}
            memory = (store.memory() - empty) / size
            found.append({**costs, "parts": parts, "pages": size, "bytes_a_page": memory})
            say(
                "  {pages:>9,} pages: put {put:5.1f} µs, get {get:5.1f} µs, failed get {failed_get:4.1f} µs,"
                " {bytes_a_page:,.0f} bytes a page".format(**found[-1])
            )
    return found


def _costs(store: PoolStore, size: int) -> dict[str, list[float]]:
    """Return the microseconds of get, put and failed get, in each of ten parts of a sample of pages."""
    chosen = random.Random(size).sample(range(size), min(SAMPLE, size))
    costs: dict[str, list[float]] = {"get": [], "put": [], "failed_get": []}
    step = max(1, len(chosen) // 10)
    for start in range(0, len(chosen), step):
        part = chosen[start : start + step]
        pages = [(number, small_page(number)) for number in part]
        clock = [time.perf_counter()]
        for number in part:
            store.get(number)
        clock.append(time.perf_counter())
        for number in part:
            store.pool.get(1, number)  # fails
        clock.append(time.perf_counter())
        for number, page in pages:
            store.put(number, page)
        clock.append(time.perf_counter())
        for name, began, ended in zip(("get", "failed_get", "put"), clock, clock[1:], strict=False):
            costs[name].append(1e6 * (ended - began) / len(part))
    return costs


def small_page(number: int) -> bytes:
    """Return a page that lz4 compresses about 8:1; all numbers give different pages."""
    return _NUMBER.pack(number) + _REST


_NUMBER = struct.Struct("<Q")
_REST = random.Random(10).randbytes(440) + bytes(PAGE_SIZE - 448)


def _goals(figures: Figures) -> list[Goal]:
    goals, stores = [], figures["stores"]
    ours = stores[OURS]
    for name, other in stores.items():
        if name != OURS:
            ratios = [ours[key] / other[key] for key in ("puts_a_second", "gets_a_second", "bytes_a_page")]
            text = "puts {:.2f}×, gets {:.2f}×, memory {:.2f}×".format(*ratios)
            goals.append(Goal(f"the pool alone, against {name}", "–", text))
    growth = figures["growth"]
    first, last = growth[0], growth[-1]
    text = ", ".join(f"{name} {last[name] / first[name]:.2f}×" for name in ("put", "get"))
    goals.append(Goal(f"cost with {last['pages']:,} pages against {first['pages']:,}", "–", text))
    return goals


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pages", type=int, default=8000)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--max-pages", type=int, default=5_000_000, help="pages at the end of the growth")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pages, asked.rounds, asked.max_pages))
