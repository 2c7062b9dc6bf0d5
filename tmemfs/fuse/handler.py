"""The decorator of all FUSE request handlers: errors become replies, and latencies are measured.

No other module uses FUSEError. Any other exception that leaves a handler ends pyfuse3's main loop, and with it the
mount. So an OSError becomes its errno, and any other exception is logged and becomes EIO.
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


class HasStats(Protocol):
    """An object with counters."""

    stats: Stats


S = TypeVar("S", bound=HasStats)
Handler = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def fuse_handler(handler: Handler[S, P, R]) -> Handler[S, P, R]:
    """Return the handler with its exceptions as FUSEError and its latency counted under its name."""
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
