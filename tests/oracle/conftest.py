from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.oracle.pool import Tmem
from tests.tmem.faultysource import FaultySource
from tests.tmem.implementations import making

MakeTmem = Callable[[int], tuple[FaultySource, Tmem]]


@pytest.fixture
def make_tmem() -> Iterator[MakeTmem]:
    """Return a function that makes an oracle of so many slabs; `check()` of each runs at teardown."""
    with making(Tmem) as make:
        yield make
