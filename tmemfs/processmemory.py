"""Lock the memory of a process that the kernel swaps to, so that serving a swap request never waits for memory.

The kernel swaps pages out by asking this process to write them. If the process could be swapped out itself, or waited
for memory that only this write can free, both would wait forever. All three settings are made after the fork and before
the first thread that serves, because threads inherit PR_SET_IO_FLUSHER; the log's thread may wait for memory. A guest
that is not permitted one of them logs this and runs without it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import re
import resource
from pathlib import Path

log = logging.getLogger(__name__)

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER = 57
_MADV_DONTNEED_LOCKED = 24  # Linux 5.18
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_NEVER_KILL = "-1000"

_libc = ctypes.CDLL(None, use_errno=True)


def lock_process_memory() -> None:
    """Lock all memory, present and future; exempt the process from the OOM killer and from waiting for writeback."""
    # ONFAULT: otherwise every page of every sparse mapping would be allocated. With a limit on locked memory we do not
    # lock at all, because new mappings would fail once it is reached.
    if _may_lock_everything():
        _log_failure("mlockall", _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))
    else:
        log.info("mlockall is not permitted: this process can be swapped out itself, so tmemfs swapon will refuse")
    _log_failure("PR_SET_IO_FLUSHER", _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0))
    try:
        _OOM_SCORE_ADJ.write_text(_NEVER_KILL)
    except OSError as error:
        log.info("oom_score_adj is not permitted (%s): continuing without it", error.strerror)


def is_locked() -> bool:
    """Return whether the memory of this process is locked."""
    found = re.search(r"^VmLck:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is not None and int(found[1]) > 0


def _may_lock_everything() -> bool:
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


def _log_failure(what: str, result: int) -> None:
    if result != 0:
        log.info("%s is not permitted (%s): continuing without it", what, os.strerror(ctypes.get_errno()))


def release_pages(mapping: mmap.mmap, start: int, size: int) -> None:
    """Free the pages of a part of a mapping, even if they are locked."""
    try:
        mapping.madvise(mmap.MADV_DONTNEED, start, size)
    except OSError:  # EINVAL: it is locked
        mapping.madvise(_MADV_DONTNEED_LOCKED, start, size)
