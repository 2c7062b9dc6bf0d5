"""A log that blocks does not block its callers; it loses only lines that do not fit, and counts them."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tmemcommon.logwriter import MAX_QUEUED, LogFile, LogWriter

FILLING = "x" * 200


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    os.close(ends[0])


def logger(writer: LogWriter) -> logging.Logger:
    made = logging.Logger("test")
    made.addHandler(writer)
    return made


def drained(fd: int, until: str) -> list[str]:
    """Read lines until one contains this text."""
    content = b""

    def read() -> bool:
        nonlocal content
        try:
            content += os.read(fd, 1 << 20)
        except BlockingIOError:
            return False
        return until in content.decode()

    wait_until(read, until)
    return content.decode().splitlines()


def test_a_full_pipe_blocks_no_caller_and_lost_lines_are_counted(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    log = logger(writer)
    lines = MAX_QUEUED + 2000
    for number in range(lines):
        log.info("%d %s", number, FILLING)
    log.info("lost")
    found = drained(pipe[0], "missing here")
    kept = [int(line.partition(" ")[0]) for line in found[:-1]]
    assert kept == sorted(set(kept))
    assert kept[:MAX_QUEUED] == list(range(MAX_QUEUED))
    assert found[-1].startswith(f"{lines + 1 - len(kept)} lines are missing here")
    log.info("on")
    assert drained(pipe[0], "on") == ["on"]
    writer.close()


def test_flush_waits_for_queued_lines_but_not_for_a_log_that_hangs(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmemcommon.logwriter.FLUSH_SECONDS", 0.2)
    writer = LogWriter(pipe[1])
    log = logger(writer)
    log.info("first")
    writer.flush()
    assert os.read(pipe[0], 100) == b"first\n"
    for _ in range(MAX_QUEUED + 2000):
        log.info(FILLING)
    writer.flush()
    writer.close()
    drained(pipe[0], "missing here")


def test_lines_that_a_full_disk_refuses_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogFile(tmp_path / "log")
    log = logger(writer)

    def full(fd: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("tmemcommon.logwriter.os.write", full)
        log.info("lost")
        log.info("lost, too")
        writer.flush()
    log.info("kept")
    writer.flush()
    kept, missing = (tmp_path / "log").read_text().splitlines()
    assert kept == "kept"
    assert missing.startswith("2 lines are missing here")
    writer.close()


def test_a_log_file_is_reopened_with_the_same_mode(tmp_path: Path) -> None:
    path, before = tmp_path / "log", tmp_path / "log.1"
    umask = os.umask(0o027)
    try:
        writer = LogFile(path)
        os.umask(0)  # as a mount sets it
        log = logger(writer)
        log.info("before")
        path.rename(before)
        writer.reopen()
    finally:
        os.umask(umask)
    log.info("after")
    writer.flush()
    assert (before.read_text(), path.read_text()) == ("before\n", "after\n")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(before.stat().st_mode) == 0o640
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        writer.reopen()
    log.info("goes on in the old one")
    writer.close()


def test_a_line_that_is_not_utf8_and_a_traceback_are_written(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    log = logger(writer)
    try:
        raise ValueError("\udcff")
    except ValueError:
        log.exception("bad name")
    writer.flush()
    lines = os.read(pipe[0], 1 << 16).decode().splitlines()
    assert lines[0] == "bad name"
    assert lines[-1] == "ValueError: \\udcff"
    writer.close()
