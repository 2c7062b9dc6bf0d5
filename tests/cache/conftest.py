from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cache.caches import IMPLEMENTATIONS

MakeCache = Callable[..., Any]


@pytest.fixture(params=list(IMPLEMENTATIONS))
def make_cache(request: pytest.FixtureRequest) -> Iterator[MakeCache]:
    """Return a function that makes a cache of so many frames; `check()` of each runs at teardown."""
    made: list[Any] = []

    def make(frames: int, **settings: Any) -> Any:
        made.append(IMPLEMENTATIONS[request.param](frames, **settings))
        return made[-1]

    yield make
    for cache in made:
        cache.check()
        cache.close()
