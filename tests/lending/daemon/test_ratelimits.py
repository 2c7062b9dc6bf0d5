"""How many frames and log lines a user may cause, over all of its connections."""

from __future__ import annotations

import logging

import pytest

from tmem.lending.daemon.ratelimits import (
    ALL_FRAMES_BURST,
    CONNECT_FRAMES,
    FRAMES_BURST,
    FRAMES_PER_SECOND,
    LINES_BURST,
    FrameLimits,
    LogLimiter,
    TokenBucket,
    about_user,
)


def delay(limits: FrameLimits, uid: int, now: float = 0.0) -> float:
    """Return how long a new connection of the user would have to wait."""
    return max((bucket.delay(now) for bucket in limits.on_connect(uid, (), now)), default=0.0)


def test_a_bucket_is_emptied_and_fills_again() -> None:
    bucket = TokenBucket(10.0, 100.0, 0.0)
    bucket.spend(0.0, 100)
    assert bucket.delay(0.0) == 0.0
    bucket.spend(0.0, 20)
    assert bucket.delay(0.0) == pytest.approx(2.0)
    assert bucket.delay(1.5) == pytest.approx(0.5)
    assert bucket.delay(2.0) == 0.0
    assert not bucket.is_full(2.0)
    assert bucket.is_full(100.0)


def test_all_connections_of_a_user_share_one_limit() -> None:
    limits = FrameLimits(frozenset({0}), 0.0)
    for _ in range(4):
        for bucket in limits.on_connect(1000, (), 0.0):
            bucket.spend(0.0, int(FRAMES_BURST / 4))
    assert delay(limits, 1000) == pytest.approx(5 * CONNECT_FRAMES / FRAMES_PER_SECOND)
    assert delay(limits, 2000) == 0.0


def test_all_untrusted_users_share_another_limit() -> None:
    limits = FrameLimits(frozenset({0, 7}), 0.0)
    for uid in range(1000, 1004):
        for bucket in limits.on_connect(uid, (), 0.0):
            bucket.spend(0.0, int(ALL_FRAMES_BURST / 4))
    assert delay(limits, 2000) > 0.0
    assert delay(limits, 0) == delay(limits, 7) == 0.0


def test_reconnecting_does_not_refill_a_bucket() -> None:
    limits = FrameLimits(frozenset(), 0.0)
    limits.on_connect(1000, (), 0.0)[0].spend(0.0, 2 * int(FRAMES_BURST))
    limits.on_connect(2000, (), 0.0)
    assert delay(limits, 1000) > 1.0
    kept = limits.on_connect(3000, (), 1000.0)[0]
    limits.on_connect(4000, {3000}, 2000.0)
    assert limits.on_connect(3000, (), 2000.0)[0] is kept, "an open connection spends from it"


def record(uid: int | None = None) -> logging.LogRecord:
    made = logging.LogRecord("tmemd", logging.WARNING, "", 0, "a line of %d", (uid or 0,), None)
    made.__dict__.update({} if uid is None else about_user(uid))
    return made


def test_log_lines_about_one_user_are_limited_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = LogLimiter()
    passed = sum(lines.filter(record(1000)) for _ in range(1000))
    assert LINES_BURST <= passed <= LINES_BURST + 1
    assert lines.filter(record(2000))
    assert all(lines.filter(record()) for _ in range(1000))
    now = 60.0
    line = record(1000)
    assert lines.filter(line)
    assert line.getMessage() == f"a line of 1000 ({1000 - passed} lines about this user were left out)"
