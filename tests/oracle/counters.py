"""The counters of a pool while it runs, and the exception that carries the reason of a refused put."""

from __future__ import annotations

from dataclasses import dataclass

from tmem.stats import Reason


class Refused(Exception):
    """A put was refused; nothing of the page is stored."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(slots=True)
class PoolCounters:
    """The counters of one pool."""

    puts: int = 0  # puts, accepted or refused
    rejected_frozen: int = 0
    rejected_no_slot: int = 0
    rejected_same_filled: int = 0
    rejected_source: int = 0
    rejected_codec: int = 0
    rejected_memory: int = 0
    succ_gets: int = 0  # gets that returned a page
    failed_gets: int = 0  # gets that returned none
    flushes: int = 0  # pages removed by flush_page and flush_object
    corrupt: int = 0  # pages whose checksum failed at a get
    evictions: int = 0  # pages dropped to make room
    ghost_hits: int = 0  # failed gets that would have hit in a pool twice as large
    pages: int = 0  # pages held now

    def refuse(self, reason: Reason) -> None:
        """Count a refused put."""
        setattr(self, reason.value, getattr(self, reason.value) + 1)
