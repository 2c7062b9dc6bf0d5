"""Count on all cores, in processes that share nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def on_all_cores(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
    """Work on tasks in their order, as many at a time as there are cores; give each result as soon as it is there."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _ignore_interrupts) as workers:
        yield from workers.imap_unordered(work, tasks)


def _ignore_interrupts() -> None:
    """Leave a Ctrl-C to the parent, which terminates its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
