"""Runs a call in a child process of another user."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

OTHER_UID = 12_001


def as_other(call: Callable[[], None]) -> None:
    """Run a call in a child of another user. Raise AssertionError if it fails there.

    The user may not be able to read our files, so the modules that it needs must be imported before.
    """
    child = os.fork()
    if child == 0:
        status = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            os.setgroups([])
            os.setgid(OTHER_UID)
            os.setuid(OTHER_UID)
            call()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGINT)  # it ends what it has started
        os.waitpid(child, 0)
        raise
    assert status == 0, "the other user's part failed: see what it printed"
