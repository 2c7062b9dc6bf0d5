"""Run async tests under a virtual clock and with a repeatable order of tasks.

Under a MockClock, time passes when no task can run: a deadlock ends in `trio.TooSlowError` at once, and an hour of
write-back takes milliseconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

import trio
import trio.testing

P = ParamSpec("P")
T = TypeVar("T")
_VIRTUAL_SECONDS = 3600.0


def in_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Turn an async test into one that runs in `run_seeded`."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_seeded(lambda: test(*args, **kwargs))

    return run


def run_seeded(main: Callable[[], Awaitable[T]], seed: int = 1) -> T:
    """Run `main` in trio under a virtual clock; the same seed gives the same order of tasks."""
    scheduler: Any = trio._core._run
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)

    async def bounded() -> T:
        with trio.fail_after(_VIRTUAL_SECONDS):
            return await main()

    try:
        return trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = False


def wait_for_new_timestamp() -> None:
    """Wait several ticks of the kernel's coarse clock.

    Before Linux 6.13, two changes within one tick give a file the same times.
    """
    time.sleep(0.02)
