"""How many lines a user may have tmemd log."""

from __future__ import annotations

import logging

import pytest

from tmem.lending.daemon.loglines import LINES_AT_ONCE, LineFilter, about


def record(uid: int | None = None) -> logging.LogRecord:
    made = logging.LogRecord("tmemd", logging.WARNING, "", 0, "a line of %d", (uid or 0,), None)
    made.__dict__.update({} if uid is None else about(uid))
    return made


def test_a_user_has_so_many_lines_and_others_all_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = LineFilter()
    passed = sum(lines.filter(record(1000)) for _ in range(1000))
    assert LINES_AT_ONCE <= passed <= LINES_AT_ONCE + 1
    assert lines.filter(record(2000))
    assert all(lines.filter(record()) for _ in range(1000))
    now = 60.0
    line = record(1000)
    assert lines.filter(line)
    assert line.getMessage() == f"a line of 1000 ({1000 - passed} lines about this user were left out)"
