"""A backing with time stamps of whole seconds: writes of others within the same second are seen."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conftest import Place, wait_until
from tests.fs.failing import FailingBacking, backing
from tests.mounted import Mounted, mounting
from tests.pagebytes import pages_of

__all__ = ["backing"]

pytestmark = pytest.mark.mount
Options = tuple[str, ...]
OLD, NEW, NEWER = (pages_of(seed, 3) for seed in range(3))


@pytest.fixture
def mounted(backing: FailingBacking, place: Place) -> Iterator[Mounted]:
    """Mount over a backing with whole seconds."""
    backing.fail("stat * seconds")
    with mounting(place) as made:
        yield made


def test_a_rewrite_in_the_same_second_as_a_read_is_seen(
    backing: FailingBacking, mounted: Mounted, writing: Options
) -> None:
    root, theirs = mounted.start(*writing), backing.directory / "f"
    for _ in range(20):  # until all of this happens within one second
        theirs.write_bytes(OLD)
        seconds = os.stat(theirs).st_mtime_ns // 1_000_000_000
        assert (root / "f").read_bytes() == OLD
        with theirs.open("r+b") as file:
            file.write(NEW)
        if os.stat(theirs).st_mtime_ns // 1_000_000_000 == seconds:
            break
    else:
        pytest.fail("the machine is too slow for anything to happen within a second")
    assert (root / "f").read_bytes() == NEW
    with (root / "f").open("r+b") as own:
        own.write(b"own")
    assert theirs.read_bytes() == b"own" + NEW[3:]
    with theirs.open("r+b") as file:
        file.write(NEWER)
    assert (root / "f").read_bytes() == NEWER

    def reads() -> int:
        before: int = mounted.stats()["backing_reads"]
        assert (root / "f").read_bytes() == NEWER
        return int(mounted.stats()["backing_reads"]) - before

    wait_until(lambda: reads() == 0, "it is read from memory once its second has passed")


def test_with_watch_an_open_file_shows_foreign_writes_within_a_second(
    backing: FailingBacking, mounted: Mounted
) -> None:
    (backing.directory / "f").write_bytes(OLD)
    root = mounted.start("--watch")
    with (root / "f").open("rb", buffering=0) as file, (mounted.source / "f").open("r+b", buffering=0) as theirs:
        for content in (OLD, NEW, NEWER, OLD):
            os.pwrite(theirs.fileno(), content, 0)
            wait_until(lambda: os.pread(file.fileno(), len(OLD), 0) == content, "it is seen")  # noqa: B023
