"""Limits on what each user makes tmemd do: frames that it handles and lines that it logs.

A frame costs tmemd about 30 us. One connection may send 2,000 a second, but a user may have many connections: 200 of
them delayed others by 20 seconds. So all connections of a user share one limit, and all users that tmemd does not
trust share another. A user above its limit is not cut off: its messages wait in its sockets. Root and tmemd's own user
have no such limit, so their verbs wait for little more than one turn of the others.

Log lines are limited as well, because connecting and being refused costs a user nothing and fills the disk.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Container, Sequence

FRAMES_PER_SECOND = 2000.0
FRAMES_BURST = 4000.0
ALL_FRAMES_PER_SECOND = 8000.0
ALL_FRAMES_BURST = 8000.0
CONNECT_FRAMES = 20  # what a new connection counts as
LINES_PER_SECOND = 0.2
LINES_BURST = 100.0


class TokenBucket:
    """A token bucket: `burst` tokens at once, `per_second` more each second. `now` is seconds on one clock."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._tokens, self._since = burst, now

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now - self._since) * self._per_second)
        self._since = now

    def spend(self, now: float, tokens: int) -> None:
        """Remove tokens, even if there are fewer."""
        self._refill(now)
        self._tokens -= tokens

    def delay(self, now: float) -> float:
        """Return the seconds until the number of tokens is not negative."""
        self._refill(now)
        return max(0.0, -self._tokens / self._per_second)

    def is_full(self, now: float) -> bool:
        """Return whether no token is missing."""
        self._refill(now)
        return self._tokens >= self._burst


class FrameLimits:
    """The buckets for frames: one for each user that is or was just connected, and one for all untrusted users."""

    def __init__(self, trusted: frozenset[int], now: float) -> None:
        self._trusted = trusted
        self._all = TokenBucket(ALL_FRAMES_PER_SECOND, ALL_FRAMES_BURST, now)
        self._of_user: dict[int, TokenBucket] = {}

    def on_connect(self, uid: int, connected: Container[int], now: float) -> Sequence[TokenBucket]:
        """Charge a user for a new connection and return the buckets that the connection spends from.

        `connected` are the users with other connections. A bucket is kept until it is full: reconnecting gains nothing.
        """
        if uid in self._trusted:
            return ()
        if uid not in self._of_user:
            kept = (user for user, bucket in self._of_user.items() if user in connected or not bucket.is_full(now))
            self._of_user = {user: self._of_user[user] for user in kept}
        buckets = (self._of_user.setdefault(uid, TokenBucket(FRAMES_PER_SECOND, FRAMES_BURST, now)), self._all)
        for bucket in buckets:
            bucket.spend(now, CONNECT_FRAMES)
        return buckets


def about_user(uid: int | None) -> dict[str, int]:
    """Return the `extra` of a log line about a user; None stands for an unknown one."""
    return {"uid": -1 if uid is None else uid}


class LogLimiter(logging.Filter):
    """Limits the log lines about each user (`about_user`); passes all others."""

    def __init__(self) -> None:
        super().__init__()
        self._buckets: dict[int, TokenBucket] = {}
        self._dropped: Counter[int] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a line; add to it how many lines about its user were dropped before."""
        uid, now = getattr(record, "uid", None), time.monotonic()
        if uid is None:
            return True
        if uid not in self._buckets:
            self._buckets = {user: bucket for user, bucket in self._buckets.items() if not bucket.is_full(now)}
        bucket = self._buckets.setdefault(uid, TokenBucket(LINES_PER_SECOND, LINES_BURST, now))
        if bucket.delay(now) > 0:
            self._dropped[uid] += 1
            return False
        bucket.spend(now, 1)
        if dropped := self._dropped.pop(uid, 0):
            record.msg, record.args = f"{record.getMessage()} ({dropped} lines about this user were left out)", ()
        return True
