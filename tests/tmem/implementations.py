"""The implementations of the contract of transcendent memory: each runs the same tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tests.oracle.pool import Pool as OraclePool
from tests.oracle.pool import Tmem as OracleTmem
from tests.tmem.faultysource import FaultySource
from tmem import SLAB_SIZE, Pool, Tmem

AnyTmem = OracleTmem | Tmem
AnyPool = OraclePool | Pool
Made = TypeVar("Made", bound=AnyTmem)
IMPLEMENTATIONS: dict[str, type[AnyTmem]] = {"python": OracleTmem, "engine": Tmem}


@contextmanager
def making(implementation: type[Made]) -> Iterator[Callable[[int], tuple[FaultySource, Made]]]:
    """Return a function that makes a backend of so many slabs; `check()` of each runs at the end."""
    made: list[tuple[FaultySource, Made]] = []

    def make(slabs: int) -> tuple[FaultySource, Made]:
        source = FaultySource(slabs * SLAB_SIZE)
        made.append((source, implementation(source, clock=lambda: 0.0)))
        return made[-1]

    yield make
    for source, tmem in made:
        tmem.check()
        source.check()
        source.close()
