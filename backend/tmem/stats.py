"""Counters: what a pool and a whole backend have done and hold."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Why a put was refused; each has its own counter."""

    FROZEN = "rejected_frozen"  # the pool was frozen
    NO_SLOT = "rejected_no_slot"  # no slab to get and nothing that may be evicted
    SAME_FILLED = "rejected_same_filled"  # the bound on same-filled pages is used up by persistent ones
    SOURCE = "rejected_source"  # the slab source failed, and no slot was found without it
    CODEC = "rejected_codec"  # the compressor failed
    MEMORY = "rejected_memory"  # the memfd could not be written, or there was no memory for the index


class Refused(Exception):
    """A put that was refused; nothing of the page is kept."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(slots=True)
class PoolCounters:
    """The running counts of one pool."""

    puts: int = 0  # puts asked for, accepted or not
    rejected_frozen: int = 0
    rejected_no_slot: int = 0
    rejected_same_filled: int = 0
    rejected_source: int = 0
    rejected_codec: int = 0
    rejected_memory: int = 0
    succ_gets: int = 0  # gets that gave a page
    failed_gets: int = 0  # gets that gave none
    flushes: int = 0  # pages that flush_page and flush_object removed
    corrupt: int = 0  # pages whose stored bytes failed the checksum at a get
    evictions: int = 0  # pages dropped to make room
    ghost_hits: int = 0  # failed gets that a pool twice as large would have answered
    pages: int = 0  # pages held now

    def refuse(self, reason: Reason) -> None:
        """Count a refused put under its reason."""
        setattr(self, reason.value, getattr(self, reason.value) + 1)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool's counts at one moment; the fields are PoolCounters'."""

    puts: int
    rejected_frozen: int
    rejected_no_slot: int
    rejected_same_filled: int
    rejected_source: int
    rejected_codec: int
    rejected_memory: int
    succ_gets: int
    failed_gets: int
    flushes: int
    corrupt: int
    evictions: int
    ghost_hits: int
    pages: int

    @property
    def rejected_puts(self) -> int:
        """Puts refused, for whatever reason."""
        return sum(getattr(self, reason.value) for reason in Reason)


@dataclass(frozen=True, slots=True)
class TmemStats:
    """What all pools of one slab source hold, and what they have lost."""

    slabs: int  # slabs held, in use and spare
    lent_bytes: int  # their memory
    used_bytes: int  # stored bytes in occupied slots
    pages: int  # pages held, same-filled ones too
    original_bytes: int  # their size as pages
    compressed_bytes: int  # used_bytes and the 64 bytes that each same-filled page is charged
    same_filled_pages: int
    raw_pages: int  # pages stored as they are
    evictions: int  # pages dropped to make room
    revoked_slabs: int  # slabs taken away by the source
    index_bytes: int  # estimate of the Python memory of index, queues, slot maps and ghosts
    ghost_hits: int  # failed gets that a pool twice as large would have answered
