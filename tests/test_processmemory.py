"""Locked process memory: allocated on touch, released on demand, and a log line for what is not permitted."""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path

import pytest

from tests.conftest import run
from tmemcommon import libc
from tmemfs import processmemory

LOCKED = """
import logging, mmap, sys
from tmemfs import processmemory
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
processmemory.lock_process_memory()
assert processmemory.is_locked()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
mapping = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
sparse = resident()
mapping.write(b"x" * (32 << 20))
full = resident()
assert full - sparse > 24 << 20, "touched pages are resident"
processmemory.release_pages(mapping, 0, 32 << 20)
assert resident() < full - (24 << 20), "released pages are not"
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
    calls: list[int] = []
    monkeypatch.setattr(libc, "mlockall", calls.append)
    monkeypatch.setattr(libc, "prctl", lambda option, value: calls.append(option))
    monkeypatch.setattr(processmemory, "_OOM_SCORE_ADJ", Path("/proc/self/no_such_file/score"))
    with caplog.at_level(logging.INFO):
        processmemory.lock_process_memory()
    assert calls == [libc.PR_SET_IO_FLUSHER], "mlockall was not tried"
    assert "tmemfs swapon will refuse" in caplog.text
    assert "oom_score_adj is not permitted" in caplog.text
