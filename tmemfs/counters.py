"""The names of all counters and gauges of a guest. Users' dashboards depend on them.

Counters only grow and can be reset. Gauges describe a state. docs/metrics.md explains each.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from tmem import SLAB_SIZE, Tmem
from tmem.arena import PAGE_SHIFT
from tmem.lending.guest.client import Client
from tmem.lending.protocol.kind import Kind
from tmemfs.balloon import Balloon
from tmemfs.cache.stocking import Stocking
from tmemfs.datapath import DataPath
from tmemfs.hswap.hswap import HswapCounters
from tmemfs.hswap.pagemap import PageMap
from tmemfs.hswap.swaparea import SwapArea
from tmemfs.stats import Stats
from tmemfs.watching.source import SourceMount


class Counted(Protocol):
    """The parts of a guest that have counters."""

    balloon: Balloon | None
    data: DataPath
    lender: Client | None
    source: SourceMount
    stocking: Stocking
    swap: SwapArea | None
    tmem: Tmem

    @property
    def frozen(self) -> bool:
        """Whether the pools accept no new pages."""


def register(stats: Stats, guest: Counted) -> None:
    """Register every counter of a guest."""
    memory, reader, backing, inodes = guest.data.memory, guest.data.reader, guest.data.backing, guest.data.inodes
    stats.gauges(
        "cache_",
        lambda: {
            "capacity_bytes": memory.capacity,
            "resident_bytes": memory.resident << PAGE_SHIFT,
            "dirty_bytes": memory.dirty_pages << PAGE_SHIFT,
        },
    )
    stats.counters(
        "cache_",
        lambda: {
            "hits": memory.hits - memory.readahead_hits,  # without first uses of pages that were read ahead
            "misses": memory.misses,  # not in the cache; the pool may have had them
            "evictions": memory.evictions,
            "waits": reader.waits,  # for pages that another request was already reading
        },
    )
    _register_demand(stats, guest)
    stats.ratio("cache_hit_ratio", ("cache_hits",), ("demand_pages",))
    _register_pool(stats, guest)
    _register_hswap(stats, guest)
    stats.counters(
        "backing_",
        lambda: {
            "reads": backing.reads,
            "pages": backing.pages,  # on demand and read-ahead
            "read_bytes": backing.read_bytes,
            "writes": backing.writes,
            "write_bytes": backing.write_bytes,
            "calls": backing.calls,  # for names and attributes
            "errors": backing.errors,
            "read_seconds": round(backing.read_seconds, 6),
        },
    )
    stats.gauges("backing_", lambda: {"replaced": int(guest.source.replaced)})  # SOURCE now leads to another mount
    stats.counters("coherency_", lambda: {"mismatches": inodes.invalidations})
    balloon = guest.balloon
    if balloon is not None:
        stats.counters("balloon_", lambda: {"grows": balloon.grows, "shrinks": balloon.shrinks})
    _register_lender(stats, guest)
    watch = guest.data.watch
    if watch is not None:
        stats.counters(
            "watch_",
            lambda: {
                "events": watch.watches.events,
                "overflows": watch.overflows,  # events were lost, so everything was checked again
                "refusals": watch.watches.refusals,  # directories that could not be watched
            },
        )
        stats.gauges("watch_", lambda: {"directories": len(watch.watches)})
    stats.gauges("inode_", lambda: {"count": len(inodes), "descriptors": len(guest.data.descriptors)})
    stats.ratio("hit_ratio", ("demand_hits",), ("demand_pages",))


def _register_demand(stats: Stats, guest: Counted) -> None:
    """Register the counters of requested pages and of read-ahead."""
    data = guest.data
    memory, reader, backing, pool = data.memory, data.reader, data.backing, data.memory.pool

    def demand() -> dict[str, int | float]:
        now = pool.stats
        return {
            "pages": memory.hits + memory.misses,
            "hits": memory.hits - memory.readahead_hits + now.succ_gets + now.reads,  # in the cache or the pool
            "misses": reader.waits + backing.pages - backing.readahead_pages,  # that a request waited for
        }

    stats.counters("demand_", demand)
    stats.counters(
        "readahead_",
        lambda: {
            "pages": backing.readahead_pages,  # read before a request for them
            "hits": memory.readahead_hits,  # of these, requested while in the cache
            "unused": memory.unused,  # of these, evicted before a request
        },
    )


def _register_pool(stats: Stats, guest: Counted) -> None:
    memory, tmem, pool = guest.data.memory, guest.tmem, guest.data.memory.pool

    # The names exist without a pool, too, so that dashboards need no special case.
    def pool_counters() -> dict[str, int | float]:
        now = pool.stats
        return {
            "puts": now.puts,
            "rejected_puts": now.rejected_puts,
            "succ_gets": now.succ_gets,
            "reads": now.reads,  # pages that were read in the pool, where they stay
            "failed_gets": now.failed_gets,
            "flushes": now.flushes,
            "dropped": memory.dropped,  # evicted without a put, for lack of time
            "passed": memory.bypassed,  # pages of a first sequential scan, dropped instead of pooled
        }

    stats.counters("precache_", pool_counters)
    found = ("precache_succ_gets", "precache_reads")
    stats.ratio("precache_hit_ratio", found, (*found, "precache_failed_gets"))

    def gauges() -> dict[str, int | float | None]:
        now = tmem.stats()
        return {
            "slabs": now.slabs,
            "lent_bytes": now.lent_bytes,
            "stock_bytes": guest.stocking.stocked_bytes,  # populated, not yet used by the pool
            "used_bytes": now.used_bytes,
            "pages": now.pages,
            "original_bytes": now.original_bytes,
            "compressed_bytes": now.compressed_bytes,
            "compression_ratio": round(now.original_bytes / now.compressed_bytes, 3) if now.compressed_bytes else None,
            "same_filled_pages": now.same_filled_pages,
            "raw_pages": now.raw_pages,
            "duplicate_pages": now.duplicate_pages,  # compressed copies of pages in the cache: not in pool_pages
            "index_bytes": now.index_bytes,
            "frozen": int(guest.frozen),  # accepts no new pages
        }

    stats.gauges("pool_", gauges)

    def counters() -> dict[str, int | float]:
        now = tmem.stats()
        return {"evictions": now.evictions, "revoked_slabs": now.revoked_slabs, "ghost_hits": now.ghost_hits}

    stats.counters("pool_", counters)


def _register_hswap(stats: Stats, guest: Counted) -> None:
    hswap = guest.swap.hswap if guest.swap is not None else None
    counters, pagemap = (hswap.counters, hswap.pagemap) if hswap is not None else (HswapCounters(), PageMap(0))
    stats.gauges(
        "hswap_",
        lambda: {
            "size_bytes": len(pagemap) << PAGE_SHIFT,
            "pool_pages": pagemap.pool_pages,
            "overflow_pages": pagemap.overflow_pages,
            "lost_pages": pagemap.lost_pages,  # reads of them fail
        },
    )
    stats.counters("hswap_", lambda: dataclasses.asdict(counters))


def _register_lender(stats: Stats, guest: Counted) -> None:
    lender = guest.lender
    if lender is None:
        return
    borrower = lender.borrower
    stats.gauges(
        "lender",
        lambda: {
            "": lender.state,
            "_cap_bytes": borrower.source.cap * SLAB_SIZE,  # the limit that tmemd sets for this mount
            "_held_bytes": sum(borrower.source.held(kind) for kind in Kind) * SLAB_SIZE,
            "_stock_bytes": borrower.source.stocked * SLAB_SIZE,  # lent, not yet used by the pool
        },
    )
    stats.counters("lender_", lambda: dataclasses.asdict(borrower.counters))
