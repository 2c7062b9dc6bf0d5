"""What a call ends with, by the name of its error."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

# The kernel's errors of a connection that is gone: aborted under the request, or before it.
GONE = ("ENOTCONN", "ECONNABORTED", "EIO")


def code_of(call: Callable[[], object]) -> str:
    """Return the name of the error that a call ends with."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "none"


def sync(fd: int) -> None:
    """Fsync; a try in between that failed owes its error to the first fsync after it, even if nothing is wrong now."""
    if code_of(lambda: os.fsync(fd)) != "none":
        os.fsync(fd)
