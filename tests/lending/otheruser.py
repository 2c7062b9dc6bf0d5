"""A child that is another user than root, and ends with the test."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

OTHER_UID = 12_001


def as_other(call: Callable[[], None]) -> None:
    """Run something in a child that is another user; AssertionError when it fails there.

    It may not be able to read our files: what it needs of modules has to be imported before.
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
