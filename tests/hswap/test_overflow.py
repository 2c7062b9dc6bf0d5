"""The overflow file: slots keep their pages, the file is private, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.hswap.fakes import raw_page
from tmemcommon.sizes import ConfigError
from tmemfs.hswap import overflow
from tmemfs.hswap.overflow import HEADER, OverflowFile

PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a path for the file."""
    return tmp_path / "overflow"


@pytest.fixture
def file(path: Path) -> Iterator[OverflowFile]:
    """Return an overflow file; it is removed at teardown."""
    made = overflow.create(path)
    yield made
    made.close()
    assert not path.exists()


def test_slots_keep_their_pages(file: OverflowFile) -> None:
    async def main() -> None:
        pages = [raw_page(seed) for seed in range(100)]
        slots = await file.write(pages)
        assert len(set(slots)) == 100
        file.check(slots)
        assert await file.read(slots) == pages
        assert await file.read(slots[::-7]) == pages[::-7]
        file.free(slots[10:60])
        again = await file.write(pages[:50])
        assert set(again) == set(slots[10:60]), "free slots are used before the file grows"
        assert await file.read(again) == pages[:50]
        assert await file.read(slots[60:]) == pages[60:]
        file.check([*slots[:10], *again, *slots[60:]])
        file.clear()
        file.check([])

    trio.run(main)


def test_concurrent_calls_do_not_mix_their_pages(file: OverflowFile) -> None:
    async def one(seed: int) -> None:
        for turn in range(5):
            pages = [raw_page(1000 * seed + turn), raw_page(seed)]
            slots = await file.write(pages)
            assert await file.read(slots) == pages
            file.free(slots)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for seed in range(20):
                nursery.start_soon(one, seed)

    trio.run(main)
    file.check([])


def test_a_page_changed_or_truncated_on_the_disk_is_an_error(file: OverflowFile, path: Path) -> None:
    async def main() -> None:
        (slot,) = await file.write([raw_page(1)])
        with path.open("r+b") as disk:
            disk.seek(slot * PAGE + 100)
            disk.write(b"x")
        with pytest.raises(OSError, match="other bytes") as changed:
            await file.read([slot])
        assert changed.value.errno == errno.EIO
        os.truncate(path, slot * PAGE + 10)
        with pytest.raises(OSError, match="shorter") as cut:
            await file.read([slot])
        assert cut.value.errno == errno.EIO

    trio.run(main)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_write_takes_no_slot(file: OverflowFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    async def main() -> None:
        (slot,) = await file.write([raw_page(1)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(OSError, match=os.strerror(code)):
                await file.write([raw_page(2), raw_page(3)])
        file.check([slot])
        assert await file.read([slot]) == [raw_page(1)]

    trio.run(main)


def test_a_short_write_is_an_error(file: OverflowFile, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:PAGE], offset))
            with pytest.raises(OSError, match="only a part"):
                await file.write([raw_page(2), raw_page(3)])
        file.check([])

    trio.run(main)


def test_disk_space_is_reserved(file: OverflowFile, path: Path) -> None:
    before = path.stat().st_blocks
    trio.run(file.reserve, 500)
    assert (path.stat().st_blocks - before) * 512 >= 500 * PAGE


def test_missing_disk_space_is_refused_before_any_is_allocated(
    file: OverflowFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = os.statvfs(path)
    before = path.stat().st_blocks
    with pytest.raises(OSError, match="No space"):
        trio.run(file.reserve, 2 * disk.f_blocks * disk.f_frsize // PAGE)
    assert path.stat().st_blocks == before

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="not supported"):
        trio.run(file.reserve, 10)


def test_the_file_has_mode_0600_and_is_not_used_by_two_mounts(file: OverflowFile, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="in use by another mount: give another --hswap-overflow"):
        overflow.create(path)
    assert path.exists()


def test_the_leftover_of_a_killed_guest_is_removed(path: Path) -> None:
    path.write_bytes(HEADER + raw_page(1))
    made = overflow.create(path)
    assert path.stat().st_size == len(HEADER)
    made.close()
    made.close()
    assert not path.exists()


def test_the_file_is_removed_even_if_its_directory_was_renamed(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    made = overflow.create(directory / "overflow")
    directory.rename(tmp_path / "moved")
    made.close()
    assert not list((tmp_path / "moved").iterdir())


def test_of_two_mounts_that_find_a_leftover_one_gets_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(HEADER)
    lock, made = fcntl.flock, []

    def be_slow(fd: int, how: int) -> None:
        monkeypatch.undo()
        made.append(overflow.create(path))  # the other one is faster
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", be_slow)
    with pytest.raises(ConfigError, match="in use by another mount"):
        overflow.create(path)
    assert path.exists()
    made[0].close()


def _precious(path: Path) -> None:
    path.write_text("precious")


def _linked(path: Path) -> None:
    target = path.with_name("target")
    target.write_bytes(HEADER)
    path.symlink_to(target)


def _hard(path: Path) -> None:
    path.write_bytes(HEADER)
    path.with_name("other").hardlink_to(path)


@pytest.mark.parametrize("make", [_precious, Path.mkdir, _linked, _hard, os.mkfifo])
def test_a_foreign_file_is_refused_and_kept(path: Path, make: object) -> None:
    assert callable(make)
    make(path)
    with pytest.raises(ConfigError, match="give another --hswap-overflow"):
        overflow.create(path)
    assert os.path.lexists(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="create its directory or give another --hswap-overflow"):
        overflow.create(tmp_path / "nowhere" / "overflow")
