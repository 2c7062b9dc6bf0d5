"""The control verbs of a guest whose backing hangs: they fail in bounded time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from tmem import Tmem
from tmemfs.stats import Stats
from tmemfs.virtual.cachecontrols import LOOKUP_SECONDS, CacheControls
from tmemfs.virtual.controlfiles import ControlFiles


class HangingTree:
    """A tree whose lookups never return."""

    async def lookup(self, parent: object, name: bytes) -> None:
        """Never return."""
        await trio.sleep_forever()


@pytest.mark.parametrize(("verb", "data"), [(b"drop_caches", b"some/path\n"), (b"held_pages", b"some/path\0")])
def test_a_lookup_on_a_hanging_backing_times_out(verb: bytes, data: bytes) -> None:
    control = ControlFiles(".tmemfs", Stats(), dict)
    nothing = cast(Any, SimpleNamespace(inodes=SimpleNamespace(root=None)))
    CacheControls(control, nothing, cast(Any, HangingTree()), Tmem(None))

    async def main() -> None:
        began = trio.current_time()
        with pytest.raises(TimeoutError, match="the backing does not answer"):
            await control.call(verb, data)
        assert trio.current_time() - began == pytest.approx(LOOKUP_SECONDS)

    trio.run(main, clock=MockClock(autojump_threshold=0))
