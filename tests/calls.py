"""The outcome of a call as the name of its errno."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

# The errors of a FUSE connection that ended during the request or before it.
GONE = ("ENOTCONN", "ECONNABORTED", "EIO")


def code_of(call: Callable[[], object]) -> str:
    """Return the name of the errno that a call fails with, or "none"."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "none"


def sync(fd: int) -> None:
    """Fsync; the first fsync after a failed write-back reports its error, so try twice."""
    if code_of(lambda: os.fsync(fd)) != "none":
        os.fsync(fd)
