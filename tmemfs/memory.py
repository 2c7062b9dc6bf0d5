"""Keep a process that swap depends on in memory.

The kernel swaps to the file by asking this process to write: if it could be swapped out itself, or had to wait for
memory that only that write can free, nothing would go on. All three settings belong between the fork and the first
thread that serves, which inherits the second; that of the log may wait for memory. A guest that may not have one of
them says so in its log and runs without.
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
_SCORE = Path("/proc/self/oom_score_adj")
_LAST_TO_BE_KILLED = "-1000"

_libc = ctypes.CDLL(None, use_errno=True)


def stay() -> None:
    """Lock memory, be the last to be killed for memory, and never wait for a page of one's own to be written."""
    # Without ONFAULT it would make every page of every sparse mapping real. With a limit on locked memory, on the other
    # hand, mappings fail from some moment on: then it is better not locked at all.
    if _may_lock_everything():
        _report("mlockall", _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))
    else:
        log.info("mlockall is not permitted: the guest can be swapped out itself, so tmemfs swapon will refuse")
    _report("PR_SET_IO_FLUSHER", _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0))
    try:
        _SCORE.write_text(_LAST_TO_BE_KILLED)
    except OSError as error:
        log.info("oom_score_adj is not permitted (%s): going on without", error.strerror)


def is_locked() -> bool:
    """Tell whether this process stays in memory."""
    found = re.search(r"^VmLck:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is not None and int(found[1]) > 0


def _may_lock_everything() -> bool:
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


def _report(what: str, result: int) -> None:
    if result != 0:
        log.info("%s is not permitted (%s): going on without", what, os.strerror(ctypes.get_errno()))


def give_back(mapping: mmap.mmap, start: int, size: int) -> None:
    """Return the memory of a part of a mapping to the system, locked or not."""
    try:
        mapping.madvise(mmap.MADV_DONTNEED, start, size)
    except OSError:  # EINVAL: it is locked
        mapping.madvise(_MADV_DONTNEED_LOCKED, start, size)
