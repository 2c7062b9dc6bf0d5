from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.tmem.faultysource import FaultySource
from tests.tmem.implementations import IMPLEMENTATIONS, AnyTmem, making

MakeTmem = Callable[[int], tuple[FaultySource, AnyTmem]]


@pytest.fixture(params=list(IMPLEMENTATIONS))
def make_tmem(request: pytest.FixtureRequest) -> Iterator[MakeTmem]:
    """Return a function that makes a backend of so many slabs; `check()` of each runs at teardown."""
    with making(IMPLEMENTATIONS[request.param]) as make:
        yield make
