"""Bounds how many lines each user may have tmemd log: connecting and being refused costs nothing, and disks are finite.

A line that is about a user has its uid (`about`). What is left out is counted and said with the user's next line.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from tmem.lending.daemon.budget import Budget

LINES_A_SECOND = 0.2
LINES_AT_ONCE = 100.0


def about(uid: int | None) -> dict[str, int]:
    """Give what marks a log line as one about a user (`extra`); None stands for one that is not known."""
    return {"uid": -1 if uid is None else uid}


class LineFilter(logging.Filter):
    """Lets lines about users through as far as each has some left, and all others."""

    def __init__(self) -> None:
        super().__init__()
        self._budgets: dict[int, Budget] = {}
        self._left_out: Counter[int] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is logged."""
        uid, now = getattr(record, "uid", None), time.monotonic()
        if uid is None:
            return True
        if uid not in self._budgets:
            self._budgets = {user: budget for user, budget in self._budgets.items() if not budget.is_full(now)}
        budget = self._budgets.setdefault(uid, Budget(LINES_A_SECOND, LINES_AT_ONCE, now))
        if budget.delay(now) > 0:
            self._left_out[uid] += 1
            return False
        budget.spend(now, 1)
        if left_out := self._left_out.pop(uid, 0):
            record.msg, record.args = f"{record.getMessage()} ({left_out} lines about this user were left out)", ()
        return True
