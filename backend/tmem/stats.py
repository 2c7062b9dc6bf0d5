"""Counters of one pool and of a whole backend, and the exceptions of a page."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """The reasons for a refused put; each value is the name of its counter."""

    FROZEN = "rejected_frozen"  # the pool was frozen
    NO_SLOT = "rejected_no_slot"  # no slab, and nothing that may be evicted
    SAME_FILLED = "rejected_same_filled"  # persistent pages use up the limit of same-filled pages
    SOURCE = "rejected_source"  # the slab source failed, and no slot was found without it
    CODEC = "rejected_codec"  # the compressor failed
    MEMORY = "rejected_memory"  # the memfd could not be written, or there was no memory for the index


class PageCorrupt(Exception):
    """A persistent page whose stored bytes are not those that were put."""

    def __init__(self, pool: str, obj: int, index: int) -> None:
        super().__init__(f"pool {pool!r}: page {index} of object {obj} is corrupt")
        self.pool, self.obj, self.index = pool, obj, index


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The counts of one pool at one moment."""

    puts: int  # accepted or refused
    rejected_frozen: int
    rejected_no_slot: int
    rejected_same_filled: int
    rejected_source: int
    rejected_codec: int
    rejected_memory: int
    succ_gets: int  # gets that returned a page; of the cache's pool: pages that moved up
    failed_gets: int  # gets that returned none
    flushes: int  # pages removed by flush_page and flush_object
    corrupt: int  # pages whose checksum failed at a get
    evictions: int  # pages dropped to make room
    ghost_hits: int  # failed gets that would have hit in a larger memory
    pages: int  # held now
    reads: int = 0  # of the cache's pool: pages that were read in their slots and stayed there

    @property
    def rejected_puts(self) -> int:
        """Refused puts, for all reasons."""
        return sum(getattr(self, reason.value) for reason in Reason)


@dataclass(frozen=True, slots=True)
class TmemStats:
    """The totals of all pools of one slab source."""

    slabs: int  # slabs held, used and spare
    lent_bytes: int  # their memory
    used_bytes: int  # stored bytes in used slots
    pages: int  # pages stored, same-filled ones included
    original_bytes: int  # their uncompressed size
    compressed_bytes: int  # used_bytes plus 64 bytes for each same-filled page
    same_filled_pages: int
    raw_pages: int  # pages stored uncompressed
    evictions: int  # pages dropped to make room
    revoked_slabs: int  # slabs taken away by the source
    index_bytes: int  # memory of the tables: entries, hash, objects, slots, ghosts, miniatures
    ghost_hits: int  # failed gets that would have hit in a larger memory
    duplicate_pages: int = 0  # compressed copies of pages that are in the cache as well: not counted as pages
