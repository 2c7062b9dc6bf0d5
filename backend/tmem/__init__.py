"""Transcendent memory: a pool of compressed pages behind put, get and flush."""

from tmem.arena import PAGE_SIZE, SLAB_SIZE, EmbeddedArena, SlabSource
from tmem.pool import CacheFrames, Pool, Tmem
from tmem.stats import PageCorrupt, PoolStats, TmemStats

__all__ = [
    "PAGE_SIZE",
    "SLAB_SIZE",
    "CacheFrames",
    "EmbeddedArena",
    "PageCorrupt",
    "Pool",
    "PoolStats",
    "SlabSource",
    "Tmem",
    "TmemStats",
]
