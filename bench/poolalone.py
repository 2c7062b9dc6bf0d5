"""Measure the pool without a filesystem: against bare lz4 and xxh3 in C, and against zram, redis and memcached.

The first part is C against C (bench/native/poolalone.c): 2:1 compressible pages are put into the engine's pool and got
back, and the same pages are compressed with a checksum, checked and decompressed. Pools of ten thousand and of up to
five million pages exist at the same time. In each round all take turns with samples of pages in random order; the
ratios of the rounds are judged. The bare side keeps its sample alone and needs no table: it is the limit, not a store.

In the second part each store is called from Python, with one page at a time. zram uses lz4 and O_DIRECT; redis and
memcached keep 4-KiB values uncompressed and are asked on a Unix socket. Memory a page is what the serving process, or
the device, takes more than when it was empty. A get removes the page from the pool; the others keep it.

    python -m bench.poolalone [--pages 8000] [--rounds 15] [--max-pages 5000000] [--out FILE]
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence

from bench.subjects.nativepool import Bare, Native, NativePool
from bench.subjects.stores import Store, memcached, redis, tmem_pool, zram
from bench.tools import procmem
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, half_compressible, shuffled
from bench.tools.harness import workspace
from bench.tools.report import Figures, Goal, Outcome, main, median, parser, ratios, say
from bench.tools.verdict import in_turn, spread

OURS = "tmem pool"
SIZES = (10_000, 100_000, 5_000_000)
SAMPLE = 5000
LIMIT_SHARE = 0.6  # of the speed of bare lz4 and xxh3, with the smallest pool: its pages are no colder than theirs
GROWTH = 1.5  # times the cost in the smallest pool
_STORE_ROUNDS = 3
_PAGE_BYTES = PAGE_SIZE // 2 + 64  # a 2:1 page in a pool, with its part of the index


def measure(count: int = 8000, rounds: int = 15, max_pages: int = 5_000_000) -> Outcome:
    """Measure the pool against its limit, then all stores."""
    figures: Figures = {"pages": count, "stores": {}, "skipped_stores": {}, "notes": []}
    with workspace() as space:
        figures |= _against_bare(Native(space), rounds, _affordable(max_pages, figures["notes"]))
    with workspace() as space, contextlib.ExitStack() as stack:
        content = list(half_compressible(count, seed=8))
        stores: dict[str, Store] = {}
        arms: dict[str, Callable[[], contextlib.AbstractContextManager[Store]]] = {
            OURS: lambda: tmem_pool(count * PAGE_SIZE),
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
        figures["stores"] = _in_turn(stores, content, min(rounds, _STORE_ROUNDS))
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


def _affordable(max_pages: int, notes: list[str]) -> int:
    """Return how many pages the largest pool can have in the memory that is available."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * PAGE_SIZE * 3 // 4 // _PAGE_BYTES
    if pages < max_pages:
        notes.append(f"the memory is enough for {pages:,} pages only")
    return min(pages, max_pages)


def _against_bare(native: Native, rounds: int, max_pages: int) -> Figures:
    """Measure pools of several sizes and bare lz4 with xxh3, in turn in each round."""
    sizes = [*(size for size in SIZES if size < max_pages), max_pages]
    costs: dict[str, dict[str, list[float]]] = {}
    memory: dict[int, float] = {}
    with contextlib.ExitStack() as stack:
        sides: dict[str, Bare | NativePool] = {"bare": stack.enter_context(native.bare(SAMPLE))}
        for size in sizes:
            before = procmem.of(os.getpid()).total
            sides[str(size)] = stack.enter_context(native.pool(size))
            memory[size] = (procmem.of(os.getpid()).total - before) / size
        chosen = random.Random(9)
        for number in range(rounds + 1):
            for name in in_turn(sides, number):
                size = sizes[0] if name == "bare" else int(name)
                sample = native.sample(chosen.sample(range(size), min(SAMPLE, size)))
                for operation, cost in sides[name].costs(sample).items():
                    if number:  # the first round warms up
                        costs.setdefault(name, {}).setdefault(operation, []).append(cost)
    bare = costs.pop("bare")
    say("  bare lz4 and xxh3: put {:.2f} µs, get {:.2f} µs".format(*(median(bare[name]) for name in ("put", "get"))))
    growth: list[Figures] = []
    for size in sizes:
        parts = costs[str(size)]
        growth.append(
            {**{name: median(values) for name, values in parts.items()}, "parts": parts, "pages": size}
            | {"bytes_a_page": memory[size]}
        )
        say(
            "  {pages:>9,} pages: put {put:5.2f} µs, get {get:5.2f} µs, failed get {failed_get:4.2f} µs,"
            " {bytes_a_page:,.0f} bytes a page".format(**growth[-1])
        )
    return {"bare": bare, "growth": growth}


def _goals(figures: Figures) -> list[Goal]:
    goals, stores = list[Goal](), figures["stores"]
    ours = stores[OURS]
    for name, other in stores.items():
        if name != OURS:
            times = [ours[key] / other[key] for key in ("puts_a_second", "gets_a_second", "bytes_a_page")]
            text = "puts {:.2f}×, gets {:.2f}×, memory {:.2f}×".format(*times)
            goals.append(Goal(f"the pool alone, against {name}", "–", text))
    bare, growth = figures["bare"], figures["growth"]
    for sized in growth:
        for name in ("get", "put"):
            found = spread(ratios(bare[name], sized["parts"][name]))
            what = f"{name} with {sized['pages']:,} pages, speed against bare lz4 and xxh3 in C"
            if sized is growth[0]:
                goals.append(Goal(what, f"≥ {LIMIT_SHARE}", found.text(".2f", "×"), found.at_least(LIMIT_SHARE)))
            else:
                goals.append(Goal(what, "–", found.text(".2f", "×")))
    for name in ("get", "put"):
        found = spread(ratios(growth[-1]["parts"][name], growth[0]["parts"][name]))
        what = f"{name} with {growth[-1]['pages']:,} pages, cost against {growth[0]['pages']:,}"
        goals.append(Goal(what, f"≤ {GROWTH}", found.text(".2f", "×"), found.at_most(GROWTH)))
    return goals


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pages", type=int, default=8000)
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--max-pages", type=int, default=5_000_000, help="pages of the largest pool")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pages, asked.rounds, asked.max_pages))
