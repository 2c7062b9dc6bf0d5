"""Changes by others invalidate what is cached, our own changes do not: the watch without a mount."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest
import trio
from inotify_simple import Event, flags  # type: ignore[import-untyped]

from tests.watching.watched import Watched
from tmem.arena import PAGE_SIZE
from tmemfs.watching import inotify


@pytest.fixture
def parts(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


CALLER = type("Caller", (), {"uid": os.geteuid(), "gid": os.getegid(), "umask": 0o022})()


def test_a_directory_is_watched_from_its_first_lookup_until_forgotten(
    parts: Watched,
) -> None:
    async def main() -> None:
        (parts.directory / "a" / "b").mkdir(parents=True)
        assert len(parts.watch.watches) == 0
        inode = await parts.find("a")
        assert len(parts.watch.watches) == 1
        await parts.listings.open(inode)
        assert len(parts.watch.watches) == 2
        parts.inodes.forget(inode.number, inode.lookups)
        assert len(parts.watch.watches) == 1
        assert inode.watch == 0
        parts.watch.check()

    trio.run(main)


def test_a_change_by_others_drops_the_pages_and_updates_the_size(parts: Watched) -> None:
    async def main() -> None:
        file = parts.make("f", b"a" * PAGE_SIZE)
        await parts.find("f")
        assert await parts.read(file, 0, 1) == b"a"
        async with parts.watching():
            (parts.directory / "f").write_bytes(b"b" * PAGE_SIZE * 2)
            await parts.until(lambda: file.inode.file.size == PAGE_SIZE * 2)
            assert await parts.read(file, 0, 1) == b"b"
            assert parts.inodes.invalidations

    trio.run(main)


def test_our_own_changes_invalidate_nothing(parts: Watched) -> None:
    async def main() -> None:
        file = parts.make("f", b"a" * PAGE_SIZE)
        await parts.find("f")
        await parts.read(file, 0, PAGE_SIZE)
        root = parts.inodes.root
        async with parts.watching():
            await parts.settled()
            parts.kernel.invalidated.clear()
            for turn in range(20):
                await parts.writer.write(file, turn, b"b")
                await trio.sleep(0.001)
            made = await parts.tree.mkdir(root, b"made", 0o755, CALLER)
            parts.inodes.add_lookup(made)
            await parts.tree.rename(root, b"f", root, b"g", 0)
            await parts.tree.link(file.inode, root, b"h")
            await parts.tree.unlink(root, b"h")
            await parts.tree.unlink(root, b"made", directory=True)
            reads = parts.backing.reads
            await parts.settled()
            assert parts.kernel.names == []
            assert parts.inodes.invalidations == 0
            assert await parts.read(file, 0, 2) == b"bb"
            assert parts.backing.reads == reads

    trio.run(main)


def test_names_that_others_create_remove_or_replace_are_invalidated(parts: Watched) -> None:
    async def main() -> None:
        for name in ("gone", "replaced", "moved"):
            (parts.directory / name).write_bytes(b"old")
            await parts.find(name)
        root = parts.inodes.root
        moved = await parts.find("moved")
        async with parts.watching():
            (parts.directory / "new").touch()
            (parts.directory / "gone").unlink()
            (parts.directory / "other").write_bytes(b"new")
            (parts.directory / "other").rename(parts.directory / "replaced")
            (parts.directory / "moved").rename(parts.directory / "there")
            wanted = {b"new", b"gone", b"replaced", b"moved", b"there"}
            await parts.until(lambda: wanted <= {name for _, name in parts.kernel.names})
            assert {number for number, _ in parts.kernel.names} == {root.number}
            assert root.number in parts.kernel.invalidated
            assert root.listing is None
            await parts.until(lambda: moved.locations == [(root, b"there")])

    trio.run(main)


def test_a_name_that_we_removed_and_others_create_is_invalidated(parts: Watched) -> None:
    async def main() -> None:
        root = parts.inodes.root
        (parts.directory / "a").touch()
        await parts.find("a")
        async with parts.watching():
            await parts.tree.unlink(root, b"a")
            await parts.settled()
            assert parts.kernel.names == []
            (parts.directory / "a").touch()
            await parts.until(lambda: (root.number, b"a") in parts.kernel.names)
            parts.kernel.names.clear()
            (parts.directory / "a").unlink()
            await parts.until(lambda: (root.number, b"a") in parts.kernel.names)

    trio.run(main)


def test_a_change_by_others_during_our_write_is_seen_after_it(parts: Watched) -> None:
    async def main() -> None:
        file = parts.make("f", b"a" * PAGE_SIZE * 2)
        await parts.find("f")
        await parts.read(file, 0, PAGE_SIZE * 2)
        async with parts.watching(), trio.open_nursery() as nursery:
            parts.backing.after_write.shut = True  # the bytes are on the disk, and the writer has its stats
            nursery.start_soon(parts.writer.write, file, 0, b"ours")
            while not parts.backing.after_write._held:
                await trio.sleep(0.001)
            with (parts.directory / "f").open("r+b") as theirs:
                theirs.seek(PAGE_SIZE)
                theirs.write(b"theirs")
            await trio.sleep(0.05)
            assert parts.inodes.invalidations == 0
            parts.backing.after_write.open()
            await parts.until(lambda: parts.inodes.invalidations == 1)
            assert await parts.read(file, 0, 4) == b"ours"
            assert await parts.read(file, PAGE_SIZE, 6) == b"theirs"

    trio.run(main)


def test_a_change_by_others_drops_the_clean_pages_of_a_dirty_file(tmp_path: Path) -> None:
    parts = Watched(tmp_path, writeback=True)

    async def main() -> None:
        file = parts.make("f", b"a" * PAGE_SIZE * 2)
        await parts.find("f")
        await parts.read(file, 0, PAGE_SIZE * 2)
        await parts.writer.write(file, 0, b"d" * PAGE_SIZE)
        assert parts.dirty_pages(file) == {0}
        async with parts.watching():
            with (parts.directory / "f").open("r+b") as theirs:
                theirs.seek(PAGE_SIZE)
                theirs.write(b"theirs")
            await parts.until(lambda: 1 not in parts.cached_pages(file))
            assert parts.dirty_pages(file) == {0}
            assert await parts.read(file, PAGE_SIZE, 6) == b"theirs"

    trio.run(main)


def test_a_change_by_others_with_equal_stamps_is_seen(parts: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.inodes, "_version", lambda st: ())  # no clock is coarser

    async def main() -> None:
        path = parts.directory / "f"
        file = parts.make("f", b"a" * PAGE_SIZE)
        await parts.find("f")
        async with parts.watching():
            for content in (b"b", b"c"):
                await parts.settled()
                assert await parts.read(file, 0, 1) != content
                with path.open("r+b") as theirs:
                    theirs.write(content)
                await parts.until(lambda: not parts.cached_pages(file))
                assert await parts.read(file, 0, 1) == content

    trio.run(main)


def test_attributes_changed_by_others_are_invalidated_for_every_node_type(parts: Watched) -> None:
    async def main() -> None:
        (parts.directory / "d").mkdir()
        os.mkfifo(parts.directory / "p")
        directory, pipe = await parts.find("d"), await parts.find("p")
        async with parts.watching():
            for inode, name in ((directory, "d"), (pipe, "p"), (parts.inodes.root, ".")):
                await parts.until(lambda: not parts.watch._busy)
                parts.kernel.invalidated.clear()
                (parts.directory / name).chmod(0o700 if name == "d" else 0o750)
                await parts.until(partial(parts.kernel.was_told_of, inode))
            assert parts.kernel.names == []

    trio.run(main)


def test_lost_events_drop_open_files_and_recheck_all_names(
    parts: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        file = parts.make("open", b"a" * PAGE_SIZE)
        await parts.read(file, 0, 1)
        for name in ("closed", "gone"):
            (parts.directory / name).touch()
        closed, gone = await parts.find("closed"), await parts.find("gone")
        (parts.directory / "gone").unlink()
        os.read(parts.watch.watches._inotify.fd, 1 << 16)  # this event is lost
        with monkeypatch.context() as patch:
            patch.setattr(inotify, "parse_events", lambda data: [Event(-1, flags.Q_OVERFLOW, 0, "")])
            (parts.directory / "any").touch()
            async with parts.watching():
                await parts.until(lambda: parts.watch.overflows)
                assert not parts.cached_pages(file)
                assert gone.attr_until == 0.0
                assert {closed.number, gone.number, 1} <= set(parts.kernel.invalidated)
                await parts.until(lambda: (1, b"gone") in parts.kernel.names)
                assert (1, b"closed") not in parts.kernel.names
                assert closed.attr_until > 0.0  # checked again
        assert parts.watch.overflows == 1
        assert "events were lost" in caplog.text

    trio.run(main)


def test_the_watch_limit_is_logged_once_with_its_remedy_and_retried(
    parts: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: object, mask: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def main() -> None:
        (parts.directory / "f").touch()
        with monkeypatch.context() as patch:
            patch.setattr(parts.watch.watches._inotify, "add_watch", full)
            for _ in range(3):
                await parts.find("f")
        assert parts.watch.watches.refusals == 1
        assert len(caplog.records) == 1
        assert "sysctl fs.inotify.max_user_watches" in caplog.text
        parts.watch.watches._refused_until = trio.current_time()
        await parts.find("f")
        assert len(parts.watch.watches) == 1

    trio.run(main)


def test_removing_a_directory_removes_its_watch(parts: Watched) -> None:
    async def main() -> None:
        (parts.directory / "d").mkdir()
        inode = await parts.find("d")
        await parts.listings.open(inode)
        await parts.find("d")
        async with parts.watching():
            (parts.directory / "d").rmdir()
            await parts.until(lambda: (1, b"d") in parts.kernel.names)
            parts.inodes.forget(inode.number, inode.lookups)
            await parts.until(lambda: len(parts.watch.watches) == 1)

    trio.run(main)
