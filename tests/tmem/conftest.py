from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.tmem.faultysource import FaultySource
from tmem import SLAB_SIZE, Tmem

MakeTmem = Callable[[int], tuple[FaultySource, Tmem]]
IMPLEMENTATIONS = {"python": Tmem}  # every implementation of the contract runs the same tests


@pytest.fixture(params=list(IMPLEMENTATIONS))
def make_tmem(request: pytest.FixtureRequest) -> Iterator[MakeTmem]:
    """Return a function that makes a backend of so many slabs; `check()` of each runs at teardown."""
    implementation = IMPLEMENTATIONS[request.param]
    made: list[tuple[FaultySource, Tmem]] = []

    def make(slabs: int) -> tuple[FaultySource, Tmem]:
        source = FaultySource(slabs * SLAB_SIZE)
        made.append((source, implementation(source, clock=lambda: 0.0)))
        return made[-1]

    yield make
    for source, tmem in made:
        tmem.check()
        source.check()
        source.close()
