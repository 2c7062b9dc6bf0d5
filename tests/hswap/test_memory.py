"""A process that stays in memory, says what it may not, and still gives memory back."""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path

import pytest

from tests.conftest import run
from tmemfs import memory

LOCKED = """
import logging, mmap, sys
from tmemfs import memory
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
memory.stay()
assert memory.is_locked()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
mapping = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
sparse = resident()
mapping.write(b"x" * (32 << 20))
full = resident()
assert full - sparse > 24 << 20, "what is touched is there"
memory.give_back(mapping, 0, 32 << 20)
assert resident() < full - (24 << 20), "and what is given back is not"
assert mapping[:10] == bytes(10)
print("done")
"""


@pytest.mark.root
def test_locked_memory_is_allocated_on_touch_and_can_be_released() -> None:
    done = run(sys.executable, "-c", LOCKED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


def test_a_limit_on_locked_memory_prevents_locking_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    calls: list[str] = []
    monkeypatch.setattr(memory, "_report", lambda what, result: calls.append(what))
    monkeypatch.setattr(memory, "_libc", _Libc())
    monkeypatch.setattr(memory, "_SCORE", Path("/proc/self/no_such_file/score"))
    with caplog.at_level(logging.INFO):
        memory.stay()
    assert calls == ["PR_SET_IO_FLUSHER"], "and mlockall was not tried"
    assert "tmemfs swapon will refuse" in caplog.text
    assert "oom_score_adj is not permitted" in caplog.text


class _Libc:
    """Accept everything."""

    @staticmethod
    def prctl(*arguments: int) -> int:
        return 0

    @staticmethod
    def mlockall(flags: int) -> int:
        raise AssertionError("mlockall was called")
