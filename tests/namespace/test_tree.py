"""Creating, linking and removing names: a node is created with its owner or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing

from tests.guestparts import Caller, MakeParts, make_parts
from tests.scheduling import in_trio
from tmemfs.inodes.inode import MAX_LOCATIONS
from tmemfs.namespace.namespace import Namespace

__all__ = ["make_parts"]


@contextmanager
def asking(who: Caller, groups: list[int]) -> Iterator[Caller]:
    """Run a process with supplementary groups, and yield it as a caller."""
    with subprocess.Popen(["sleep", "60"], user=who.uid, group=who.gid, extra_groups=groups) as process:
        try:
            yield replace(who, pid=process.pid)
        finally:
            process.kill()


@pytest.mark.root
@in_trio
async def test_a_node_whose_owner_cannot_be_set_is_removed(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()
    tree, root = Namespace(parts).tree, parts.inodes.root

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "as on a server that takes root for nobody")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(PermissionError):
        await tree.create(root, b"file", 0o644, os.O_RDWR, Caller())
    with pytest.raises(PermissionError):
        await tree.mkdir(root, b"directory", 0o755, Caller())
    with pytest.raises(PermissionError):
        await tree.symlink(root, b"link", b"file", Caller())
    assert os.listdir(parts.directory) == []

    def refuse_later(*args: object) -> None:
        (parts.directory / "other").write_text("another's")
        os.replace(parts.directory / "other", parts.directory / "file")
        refuse()

    monkeypatch.setattr(os, "chown", refuse_later)
    with pytest.raises(PermissionError):
        await tree.create(root, b"file", 0o644, os.O_RDWR, Caller())
    assert (parts.directory / "file").read_text() == "another's"


@pytest.mark.root
@in_trio
async def test_a_node_belongs_to_the_caller_from_the_start(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()
    tree, root = Namespace(parts).tree, parts.inodes.root
    directory, mine = parts.directory, Caller()
    os.chown(directory, 0, 13_002)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("it belonged to somebody else")

    monkeypatch.setattr(os, "chown", refuse)

    async def make_all(caller: Caller) -> None:
        _, fd = await tree.create(root, b"file", 0o4755, os.O_RDWR, caller)
        os.close(fd)
        await tree.mkdir(root, b"directory", 0o755, caller)
        await tree.symlink(root, b"link", b"file", caller)
        await tree.mknod(root, b"pipe", 0o644 | stat.S_IFIFO, 0, caller)
        for name in os.listdir(directory):
            st = os.lstat(directory / name)
            assert (st.st_uid, st.st_gid) == (mine.uid, mine.gid)
            (os.rmdir if stat.S_ISDIR(st.st_mode) else os.unlink)(directory / name)

    directory.chmod(0o777)
    await make_all(mine)
    directory.chmod(0o770)  # by a supplementary group, and not without
    with asking(mine, [13_002]) as caller:
        await make_all(caller)
    with asking(mine, []) as caller, pytest.raises(PermissionError):
        await make_all(caller)
    assert os.listdir(directory) == []
    (directory / "root's").touch()
    assert os.stat(directory / "root's").st_uid == 0, "this thread is root again"


@in_trio
async def test_an_unlink_during_a_write_back_is_seen_by_the_next_fstat(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    namespace = Namespace(parts)
    tree, attributes = namespace.tree, namespace.attributes
    file = parts.make("f", b"")
    await parts.writer.write(file, 0, b"new")
    parts.backing.after_write.shut = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(parts.writer.sync, file, data_only=False))
        await parts.backing.after_write.wait_held(1)
        parts.backing.after_write.release()
        await parts.backing.after_write.wait_held(1)  # the stat that it ends with was taken
        await tree.unlink(parts.inodes.root, b"f")
        parts.backing.after_write.open()
    assert (await attributes.get(file.inode)).st_nlink == 0


@in_trio
async def test_a_write_back_during_an_unlink_keeps_its_bytes(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    tree = Namespace(parts).tree
    file = parts.make("f", b"")
    await parts.writer.write(file, 0, b"new")
    parts.backing.after_meta.shut = parts.backing.after_write.shut = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.unlink, parts.inodes.root, b"f")
        await parts.backing.after_meta.wait_held(1)  # it has seen a file without bytes
        nursery.start_soon(partial(parts.writer.sync, file, data_only=False))
        await parts.backing.after_write.wait_held(1)
        parts.backing.after_write.release()
        await parts.backing.after_write.wait_held(1)  # which has them by now, and no page is dirty any more
        parts.backing.after_meta.open()
        await trio.testing.wait_all_tasks_blocked()
        assert await parts.read(file, 0, 100) == b"new"
        parts.backing.after_write.open()
    assert await parts.read(file, 0, 100) == b"new"


@in_trio
async def test_a_write_during_a_link_keeps_its_size(make_parts: MakeParts) -> None:
    parts = make_parts()
    tree = Namespace(parts).tree
    file = parts.make("f", b"short")
    parts.backing.after_meta.shut = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.link, file.inode, parts.inodes.root, b"g")
        await parts.backing.after_meta.wait_held(1)
        await parts.writer.write(file, 0, b"longer")
        parts.backing.after_meta.open()
    assert await parts.read(file, 0, 100) == b"longer"


@in_trio
async def test_a_second_walk_may_pause_between_two_requests(make_parts: MakeParts) -> None:
    """On a busy machine, a caller may wait for the processor between ESTALE and its second lookup."""
    parts = make_parts()
    namespace = Namespace(parts)
    tree, names, opener, caller = namespace.tree, namespace.revalidator, namespace.opener, Caller(pid=7)
    (parts.directory / "f").touch()
    for number in range(MAX_LOCATIONS + 1):  # more names than are known, so it is looked up again at each open
        os.link(parts.directory / "f", parts.directory / f"n{number}")
        parts.lookup(f"n{number}")
    inode = parts.lookup("f")
    with pytest.raises(OSError, match="tale"):
        await opener.open(inode, os.O_RDONLY, caller)
    await trio.sleep(1)
    assert names.is_second_walk(7)
    names.record_second_lookup(7, await tree.lookup_and_open(parts.inodes.root, b"f"))
    await trio.sleep(1)
    await opener.close(await opener.open(inode, os.O_RDONLY, caller))
    await trio.sleep(60)
    assert not names.is_second_walk(7)


@in_trio
async def test_a_directory_with_zero_links_exists_if_the_backing_counts_none(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def without_links(fd: int) -> os.stat_result:
        fields = list(st := fstat(fd))
        fields[stat.ST_NLINK] = 0
        return os.stat_result(fields, {f"st_{which}time_ns": getattr(st, f"st_{which}time_ns") for which in "amc"})

    monkeypatch.setattr(os, "fstat", without_links)
    parts = make_parts()
    opener = Namespace(parts).opener
    (parts.directory / "d").mkdir()
    assert stat.S_ISDIR((await opener.open_directory(parts.lookup("d"), 1)).st_mode)
