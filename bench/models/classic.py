"""Count the misses of a trace under well-known policies, in one cache.

LRU and FIFO need no source. S3-FIFO is Yang et al., SOSP 2023: a small FIFO of a tenth, a main FIFO, a ghost FIFO of as
many entries as main holds; two bits count hits. Belady's MIN (1966) evicts the page whose next use is latest: it is the
optimum and needs to know the future.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

NEVER = 1 << 60
MAX_HITS = 3


def lru(trace: Sequence[int], pages: int) -> int:
    """Return the misses of LRU: the least recently used page is evicted."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for page in trace:
        if page in cache:
            cache.move_to_end(page)
            continue
        misses += 1
        cache[page] = None
        if len(cache) > pages:
            cache.popitem(last=False)
    return misses


def fifo(trace: Sequence[int], pages: int) -> int:
    """Return the misses of FIFO: the page inserted first is evicted."""
    cache: set[int] = set()
    queue: deque[int] = deque()
    misses = 0
    for page in trace:
        if page in cache:
            continue
        misses += 1
        if len(cache) >= pages:
            cache.remove(queue.popleft())
        cache.add(page)
        queue.append(page)
    return misses


def s3fifo(trace: Sequence[int], pages: int) -> int:
    """Return the misses of S3-FIFO: pages enter main that were hit twice in the small queue, or had a ghost."""
    small: OrderedDict[int, int] = OrderedDict()  # page -> hits
    main: OrderedDict[int, int] = OrderedDict()
    ghosts: OrderedDict[int, None] = OrderedDict()
    small_pages = max(1, pages // 10)
    main_pages = max(1, pages - small_pages)
    misses = 0
    for page in trace:
        queue = small if page in small else main
        if page in queue:
            queue[page] = min(MAX_HITS, queue[page] + 1)
            continue
        misses += 1
        while len(small) + len(main) >= pages:
            if len(small) >= small_pages or not main:
                old, hits = small.popitem(last=False)
                if hits > 1:
                    main[old] = 0
                else:
                    ghosts[old] = None
                    if len(ghosts) > main_pages:
                        ghosts.popitem(last=False)
            else:
                old, hits = main.popitem(last=False)
                if hits:
                    main[old] = hits - 1
        if page in ghosts:
            del ghosts[page]
            main[page] = 0
        else:
            small[page] = 0
    return misses


def belady(trace: Sequence[int], pages: int) -> int:
    """Return the misses of Belady's MIN: the page whose next use is latest is evicted."""
    following = array("q", bytes(8 * len(trace)))
    seen: dict[int, int] = {}
    for place in range(len(trace) - 1, -1, -1):
        following[place] = seen.get(trace[place], NEVER)
        seen[trace[place]] = place
    cache: dict[int, int] = {}  # page -> its next use
    latest: list[tuple[int, int]] = []  # (-next use, page); stale entries are skipped
    misses = 0
    for place, page in enumerate(trace):
        if page not in cache:
            misses += 1
            if len(cache) >= pages:
                while True:
                    need, old = heapq.heappop(latest)
                    if cache.get(old) == -need:
                        del cache[old]
                        break
        cache[page] = following[place]
        heapq.heappush(latest, (-following[place], page))
    return misses


def lru_over_fifo(trace: Iterable[int], cache_pages: int, pool_pages: int) -> int:
    """Return the misses of an LRU cache whose evicted pages go through an exclusive FIFO pool."""
    cache: OrderedDict[int, None] = OrderedDict()
    pool: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for page in trace:
        if page in cache:
            cache.move_to_end(page)
            continue
        if page in pool:
            del pool[page]
        else:
            misses += 1
        cache[page] = None
        if len(cache) > cache_pages:
            evicted, _ = cache.popitem(last=False)
            pool[evicted] = None
            if len(pool) > pool_pages:
                pool.popitem(last=False)
    return misses


POLICIES: Mapping[str, Callable[[Sequence[int], int], int]] = {
    "LRU": lru,
    "FIFO": fifo,
    "S3-FIFO": s3fifo,
    "Belady": belady,
}
