"""A setattr changes the requested attributes only."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tmemfs.namespace.attributes import AttributeChanges


def test_setting_one_time_keeps_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other time is not read and written back: others may change it in between."""
    path = tmp_path / "f"
    path.touch()
    os.utime(path, ns=(5, 6))
    stat_of = os.stat

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("looked at, so it would be set to what it was")

    monkeypatch.setattr(os, "stat", refuse)
    AttributeChanges(atime_ns=-7_000_000_001).apply(os.fspath(path))
    st = stat_of(path)
    assert (st.st_atime_ns, st.st_mtime_ns) == (-7_000_000_001, 6)
    AttributeChanges(mtime_ns=8_000_000_001).apply(os.fspath(path))
    st = stat_of(path)
    assert (st.st_atime_ns, st.st_mtime_ns) == (-7_000_000_001, 8_000_000_001)


@contextmanager
def being(uid: int) -> Iterator[None]:
    """Act as an ordinary user."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.root
def test_a_writer_who_is_not_the_owner_may_set_the_times_only_to_now(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    path.chmod(0o666)
    os.utime(path, ns=(5, 6))
    fd = os.open(path, os.O_PATH)
    now = time.time_ns()
    try:
        with being(12_001):
            own = f"/proc/self/fd/{fd}"
            with pytest.raises(PermissionError) as caught:
                AttributeChanges(mtime_ns=now).apply(own)
            assert caught.value.errno == errno.EPERM
            AttributeChanges(atime_ns=now, mtime_ns=now).apply(own)  # the kernel lets through the time of now alone
    finally:
        os.close(fd)
    assert path.stat().st_mtime_ns >= now - 1_000_000_000
    assert path.stat().st_atime_ns >= now - 1_000_000_000
