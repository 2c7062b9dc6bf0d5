"""A stat of a file during a write still holds after the close: git and make compare the two."""

from __future__ import annotations

import os

import pytest

from tests.apps.programs import Options
from tests.mounted import Mounted

pytestmark = pytest.mark.mount
FIELDS = ("st_ino", "st_size", "st_blocks", "st_mtime_ns", "st_ctime_ns")


def told(st: os.stat_result) -> tuple[object, ...]:
    return tuple(getattr(st, field) for field in FIELDS)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_stat_before_the_close_holds_after_it(mounted: Mounted, writing: Options, by_name: bool) -> None:
    root = mounted.start(*writing)
    for number, size in enumerate((1, 4096, 50_000, 200_000)):
        path = root / f"f{number}"
        with path.open("wb", buffering=0) as file:
            file.write(os.urandom(size))
            before = told(os.stat(path) if by_name else os.fstat(file.fileno()))
        assert told(os.stat(path)) == before
        assert told(os.stat(mounted.source / f"f{number}")) == before
