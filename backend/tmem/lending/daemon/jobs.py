"""What tmemd tells a worker process to do to a memfd, and what the worker answers."""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

from tmem.lending.protocol.runs import Runs


class Kind(IntEnum):
    """Which call is to be made."""

    MAKE_REAL = 0
    PUNCH = 1
    FIND_HOLES = 2
    COUNT_REAL = 3


class Job(Struct, frozen=True, array_like=True):
    """One call on the memfd that comes with it."""

    kind: Kind
    runs: Runs = ()
    whole: int = 0  # slabs of the whole search, of which FIND_HOLES may be a part


class Result(Struct, frozen=True, array_like=True):
    """What came of a job; one that is not `finished` says that the worker has begun, or goes on."""

    runs: Runs = ()  # the slabs that were made real, or that are holes
    populated_bytes: int = 0
    shortage: str = ""  # why not all was made real
    finished: bool = True
