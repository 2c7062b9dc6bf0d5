from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cache.caches import CacheUnderTest
from tmemfs.cache.pagecache import PAGE_SIZE

MakeCache = Callable[..., CacheUnderTest]
IMPLEMENTATIONS = {"python": CacheUnderTest}  # every implementation runs the same tests


@pytest.fixture(params=list(IMPLEMENTATIONS))
def make_cache(request: pytest.FixtureRequest) -> Iterator[MakeCache]:
    """Return a function that makes a cache of so many frames; `check()` of each runs at teardown."""
    made: list[CacheUnderTest] = []

    def make(frames: int, **settings: Any) -> CacheUnderTest:
        made.append(IMPLEMENTATIONS[request.param](frames * PAGE_SIZE, **settings))
        return made[-1]

    yield make
    for cache in made:
        cache.close()
