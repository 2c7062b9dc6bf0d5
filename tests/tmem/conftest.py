from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tmem_pages import FaultySource

from tmem import SLAB_SIZE, Tmem

Make = Callable[[int], tuple[FaultySource, Tmem]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Give a maker of backends of so many slabs; each is checked at the end of the test."""
    made: list[tuple[FaultySource, Tmem]] = []

    def make_one(slabs: int) -> tuple[FaultySource, Tmem]:
        source = FaultySource(slabs * SLAB_SIZE)
        made.append((source, Tmem(source, clock=lambda: 0.0)))
        return made[-1]

    yield make_one
    for source, tmem in made:
        tmem.check()
        source.check()
        source.close()
