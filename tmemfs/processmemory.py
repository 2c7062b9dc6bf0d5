"""Lock the memory of a process that the kernel swaps to, so that serving a swap request never waits for memory.

The kernel swaps pages out by asking this process to write them. If the process could be swapped out itself, or waited
for memory that only this write can free, both would wait forever. All three settings are made after the fork and before
the first thread that serves, because threads inherit PR_SET_IO_FLUSHER; the log's thread may wait for memory. A guest
that is not permitted one of them logs this and runs without it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from tmemcommon import libc

log = logging.getLogger(__name__)

_MADV_DONTNEED_LOCKED = 24  # Linux 5.18
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_NEVER_KILL = "-1000"


def lock_process_memory() -> None:
    """Lock all memory, present and future; exempt the process from the OOM killer and from waiting for writeback."""
    # ONFAULT: otherwise every page of every sparse mapping would be allocated. With a limit on locked memory we do not
    # lock at all, because new mappings would fail once it is reached.
    if _may_lock_everything():
        with _failure_logged("mlockall"):
            libc.mlockall(libc.MCL_CURRENT | libc.MCL_FUTURE | libc.MCL_ONFAULT)
    else:
        log.info("mlockall is not permitted: this process can be swapped out itself, so tmemfs swapon will refuse")
    with _failure_logged("PR_SET_IO_FLUSHER"):
        libc.prctl(libc.PR_SET_IO_FLUSHER, 1)
    with _failure_logged("oom_score_adj"):
        _OOM_SCORE_ADJ.write_text(_NEVER_KILL)


def is_locked() -> bool:
    """Return whether the memory of this process is locked."""
    found = re.search(r"^VmLck:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is not None and int(found[1]) > 0


def _may_lock_everything() -> bool:
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


@contextlib.contextmanager
def _failure_logged(what: str) -> Iterator[None]:
    """Log an OSError of the block instead of raising it."""
    try:
        yield
    except OSError as error:
        log.info("%s is not permitted (%s): continuing without it", what, error.strerror)


def release_pages(mapping: mmap.mmap, start: int, size: int) -> None:
    """Free the pages of a part of a mapping, even if they are locked."""
    try:
        mapping.madvise(mmap.MADV_DONTNEED, start, size)
    except OSError:  # EINVAL: it is locked
        mapping.madvise(_MADV_DONTNEED_LOCKED, start, size)
