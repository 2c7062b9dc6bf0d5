"""Turn whatever a handler raises into a reply, and measure how long each operation takes.

The only file that knows FUSEError. An exception that leaves a handler ends pyfuse3's main loop and with it the mount,
so an OSError becomes its errno, and anything unforeseen a logged EIO.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pyfuse3 import FUSEError

from tmemfs.stats import Stats

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Measured(Protocol):
    """Operations with counters."""

    stats: Stats


S = TypeVar("S", bound=Measured)
Handler = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def answered(handler: Handler[S, P, R]) -> Handler[S, P, R]:
    """Let a handler end in a reply whatever happens; its latency is counted under its name."""
    name = handler.__name__.lstrip("_")

    @functools.wraps(handler)
    async def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        started = time.perf_counter_ns()
        try:
            return await handler(self, *args, **kwargs)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s failed unexpectedly; the caller got EIO", name)
            raise FUSEError(errno.EIO) from None
        finally:
            self.stats.latency(name).add(time.perf_counter_ns() - started)

    return wrapper
