"""Inodes: node numbers, versions that show changes by others, and the end of their lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

import pytest
import trio
import trio.testing

from tests.guestparts import Caller, MakeParts, make_parts
from tests.pagebytes import page_of, pages_of
from tests.scheduling import in_trio, wait_for_new_timestamp
from tmem.arena import PAGE_SIZE
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import OWN_NUMBERS, ROOT
from tmemfs.io.files import OpenFile
from tmemfs.namespace.namespace import Namespace

__all__ = ["make_parts"]


@in_trio
async def test_the_node_number_is_the_backings(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", b"x")
    assert file.inode.number == os.fstat(file.fd).st_ino
    assert parts.lookup("f") is file.inode
    assert file.inode.lookups == 2


@in_trio
async def test_two_names_of_one_file_are_one_inode(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", pages_of(1, 3))
    await parts.read(file, 0, 100)
    os.link(parts.directory / "f", parts.directory / "g")
    other = parts.open("g")
    assert other.inode is file.inode
    assert [name for _, name in file.inode.locations] == [b"g", b"f"]


@in_trio
async def test_node_numbers_in_use_or_reserved_are_replaced(make_parts: MakeParts) -> None:
    parts = make_parts()
    directory = parts.inodes.root
    st = os.stat(parts.directory)
    for number in (ROOT, 0, OWN_NUMBERS + 5):
        fields = list(st)
        fields[1] = number
        fields[2] += 1  # another device
        times = {"st_mtime_ns": st.st_mtime_ns, "st_ctime_ns": st.st_ctime_ns}
        found = os.stat_result(fields, times)
        inode = parts.inodes.get_or_create(directory, b"x%d" % number, found, parts.inodes.start())
        assert inode.number > OWN_NUMBERS
        assert parts.inodes.get(inode.number) is inode


@pytest.mark.parametrize("change", ["size", "content", "time", "mode", "replaced"])
@in_trio
async def test_a_change_by_others_drops_the_pages_at_the_next_open(make_parts: MakeParts, change: str) -> None:
    parts = make_parts()
    file = parts.make("f", pages_of(1, 8))
    path = parts.directory / "f"
    await parts.read(file, 0, 8 * PAGE_SIZE)
    wait_for_new_timestamp()
    if change == "size":
        os.truncate(path, 3 * PAGE_SIZE)
    elif change == "content":
        with path.open("r+b") as others:
            others.write(page_of(9))
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "mode":
        path.chmod(0o600)
    else:
        (parts.directory / "g").write_bytes(pages_of(2, 8))
        os.rename(parts.directory / "g", path)
    again = parts.open("f")
    assert await parts.read(again, 0, 1 << 20) == path.read_bytes()
    if change == "replaced":
        assert again.inode is not file.inode
        assert not parts.kernel.invalidated
    else:
        assert parts.kernel.invalidated == [file.inode.number]
        assert parts.inodes.invalidations == 1


@in_trio
async def test_without_stable_ctimes_the_version_is_size_and_mtime(make_parts: MakeParts) -> None:
    parts = make_parts(version_by="size,mtime")
    file, _ = await parts.make_cached(8)
    (parts.directory / "f").chmod(0o600)
    parts.open("f")
    assert parts.inodes.invalidations == 0
    assert len(parts.cached_pages(file)) == 8


@in_trio
async def test_a_stat_older_than_the_last_one_is_ignored(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", pages_of(1, 3))
    started = parts.inodes.start()
    old = os.fstat(file.fd)
    await parts.writer.write(file, 0, b"n" * 5 * PAGE_SIZE)
    assert not parts.inodes.merge_stat(file.inode, old, started)
    assert file.inode.file.size == 5 * PAGE_SIZE
    assert parts.inodes.invalidations == 0


@in_trio
async def test_a_change_by_others_drops_clean_pages_but_no_dirty_ones(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file, _ = await parts.make_cached(8)
    await parts.writer.write(file, 0, b"own")
    wait_for_new_timestamp()
    with (parts.directory / "f").open("r+b") as others:
        others.seek(3 * PAGE_SIZE)
        others.write(page_of(9))
    parts.open("f")
    assert parts.cached_pages(file) == {0}
    want = b"own" + parts.bytes_on_disk(file)[3:]
    assert await parts.read(file, 0, 1 << 20) == want
    assert parts.writeback is not None
    assert await parts.writeback.finish() == []
    assert parts.bytes_on_disk(file) == want


@in_trio
async def test_an_inode_with_pages_is_retained_and_found_again(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(8)
    os.close(parts.files.remove(file.number).fd)
    parts.inodes.forget(file.inode.number, file.inode.lookups)
    parts.check()
    again = parts.open("f")
    assert again.inode is file.inode
    before = parts.backing.pages
    assert await parts.read(again, 0, 8 * PAGE_SIZE) == pages_of(1, 8)
    assert parts.backing.pages == before


@in_trio
async def test_a_retained_inode_without_pages_is_removed_by_a_forget(make_parts: MakeParts) -> None:
    """A listing detects a change of the file, but its entry does not fit into the reply to the kernel."""
    parts = make_parts()
    file, _ = await parts.make_cached(8)
    os.close(parts.files.remove(file.number).fd)
    parts.inodes.forget(file.inode.number, file.inode.lookups)
    file.inode.file.drop_clean()
    parts.inodes.forget(file.inode.number, 0)
    parts.check()
    assert len(parts.inodes) == 1


@in_trio
async def test_retained_inodes_without_pages_are_removed_as_new_ones_come(make_parts: MakeParts) -> None:
    parts = make_parts()

    async def park(name: str) -> Inode:
        file = parts.make(name, b"x")
        await parts.read(file, 0, 1)
        os.close(parts.files.remove(file.number).fd)
        parts.inodes.forget(file.inode.number, file.inode.lookups)
        return file.inode

    for number in range(20):
        (await park(f"a{number}")).file.drop_clean()
    kept = [await park(f"b{number}") for number in range(20)]
    assert set(parts.inodes.all()) == {parts.inodes.root, *kept}


@in_trio
async def test_an_inode_without_pages_is_removed_by_the_last_forget(make_parts: MakeParts) -> None:
    parts = make_parts()
    for number in range(100):
        (parts.directory / f"f{number}").write_bytes(b"x")
        inode = parts.lookup(f"f{number}")
        parts.inodes.forget(inode.number, 1)
    assert len(parts.inodes) == 1


@in_trio
async def test_a_new_file_with_a_reused_number_has_no_old_state(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(8)
    old = file.inode
    st = os.fstat(file.fd)
    os.close(parts.files.remove(file.number).fd)
    parts.inodes.record_unlink(old, 0)
    new = parts.inodes.get_or_create(parts.inodes.root, b"new", st, parts.inodes.start())
    assert new is not old
    assert not new.file.holds()
    assert new.file is not old.file
    assert (new.number, new.generation) == (old.number, old.generation + 1)


@in_trio
async def test_an_open_during_our_write_waits_for_its_result(make_parts: MakeParts) -> None:
    parts = make_parts()
    opener = Namespace(parts).opener
    file, _ = await parts.make_cached(3)
    parts.backing.after_write.shut = True
    opened: list[OpenFile] = []

    async def open_it() -> None:
        opened.append(await opener.open(file.inode, os.O_RDONLY, Caller(pid=1)))

    with (parts.directory / "f").open("r+b") as others:
        others.write(b"others")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.writer.write, file, 2 * PAGE_SIZE, b"ours")
        await parts.backing.after_write.wait_held(1)
        nursery.start_soon(open_it)
        await trio.testing.wait_all_tasks_blocked()
        assert not opened
        parts.backing.after_write.open()
    await opener.close(opened[0])
    assert await parts.read(file, 0, 6) == b"others"


@in_trio
async def test_an_open_cancelled_while_it_waits_leaves_no_descriptor(make_parts: MakeParts) -> None:
    parts = make_parts()
    opener = Namespace(parts).opener
    file, _ = await parts.make_cached(3)
    parts.backing.after_write.shut = True

    def to_read() -> int:
        """Return the number of read-only descriptors of the file."""
        found = 0
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                flags = fcntl.fcntl(int(number), fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH)
                found += flags == os.O_RDONLY and os.path.samestat(os.fstat(int(number)), os.fstat(file.fd))
        return found

    before, scope = to_read(), trio.CancelScope()

    async def open_it() -> None:
        with scope:
            await opener.open(file.inode, os.O_RDONLY, Caller(pid=1))

    with (parts.directory / "f").open("r+b") as others:
        others.write(b"others")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.writer.write, file, 2 * PAGE_SIZE, b"ours")
        await parts.backing.after_write.wait_held(1)
        nursery.start_soon(open_it)
        await trio.testing.wait_all_tasks_blocked()
        assert to_read() == before + 1
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        parts.backing.after_write.open()
    parts.descriptors.closer.finish(30)
    assert to_read() == before


@in_trio
async def test_an_open_during_our_write_sees_changes_by_others(
    make_parts: MakeParts,
) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(3)
    started = parts.inodes.start()
    await parts.writer.write(file, 2 * PAGE_SIZE, b"ours")
    wait_for_new_timestamp()
    with (parts.directory / "f").open("r+b") as others:
        others.write(b"others")
    parts.inodes.merge_stat_at_open(file.inode, os.fstat(file.fd), started)
    assert await parts.read(file, 0, 6) == b"others"


@pytest.mark.parametrize("found_by", ["lookup", "listing"])
@in_trio
async def test_a_stale_lookup_of_an_unlinked_name_keeps_its_open_file_intact(
    make_parts: MakeParts, found_by: str
) -> None:
    parts = make_parts(writeback=True)
    tree, root = Namespace(parts).tree, parts.inodes.root
    file = parts.make("f", b"")
    await parts.writer.write(file, 0, b"dirty")
    started = parts.inodes.start()
    st = os.stat(parts.directory / "f")
    if found_by == "listing":
        listings = Namespace(parts).listings
        entry = await listings.entry(root, await listings.open(root), 0)
        assert entry is not None
        st, started = entry.st, entry.started
    await tree.unlink(root, b"f")
    assert parts.inodes.get_or_create_if_linked(root, b"f", st, started) is None
    assert await parts.read(file, 0, 100) == b"dirty"
    assert parts.inodes.get(file.inode.number) is file.inode


@in_trio
async def test_unlinking_the_last_name_of_a_closed_file_forgets_its_pages(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(8)
    parts.inodes.record_unlink(file.inode, 1)
    assert parts.cached_pages(file)
    os.close(parts.files.remove(file.number).fd)
    parts.inodes.record_unlink(file.inode, 0)
    assert not parts.cached_pages(file)


@in_trio
async def test_attributes_are_cached_exactly_for_the_timeout(make_parts: MakeParts) -> None:
    parts = make_parts(attr_timeout=2.0)
    file = parts.make("f", b"x")
    assert trio.current_time() + 2.0 == pytest.approx(file.inode.attr_until)
    parts.inodes.expire(file.inode)
    assert file.inode.attr_until <= trio.current_time()


@in_trio
async def test_a_descriptor_is_verified_and_never_that_of_another_file(make_parts: MakeParts) -> None:
    parts = make_parts()
    (parts.directory / "f").write_bytes(b"old")
    inode = parts.lookup("f")
    os.rename(parts.directory / "f", parts.directory / "elsewhere")
    (parts.directory / "f").write_bytes(b"another")
    with pytest.raises(OSError, match="Errno") as caught, parts.descriptors.use(inode):
        pass
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("change", ["rename", "exchange", "link", "unlink"])
@in_trio
async def test_a_stat_before_our_change_of_names_is_not_a_change_by_others(make_parts: MakeParts, change: str) -> None:
    parts = make_parts()
    file, root = parts.make("f", pages_of(1, 2)), parts.inodes.root
    tree = Namespace(parts).tree
    os.link(parts.directory / "f", parts.directory / "second")
    parts.lookup("second")
    other = parts.make("other", pages_of(2, 2))
    for opened in (file, other):
        await parts.read(opened, 0, 2 * PAGE_SIZE)
    before = parts.inodes.invalidations
    parts.backing.after_meta.shut = True
    async with trio.open_nursery() as nursery:
        match change:
            case "rename":
                nursery.start_soon(tree.rename, root, b"f", root, b"g", 0)
            case "exchange":
                nursery.start_soon(tree.rename, root, b"f", root, b"other", 2)
            case "link":
                nursery.start_soon(tree.link, file.inode, root, b"g")
            case _:
                nursery.start_soon(tree.unlink, root, b"f")
        await parts.backing.after_meta.wait_held(1)
        late = parts.inodes.start(), os.fstat(file.fd)
        for opened in (file, other):
            assert not parts.inodes.merge_stat(opened.inode, os.fstat(opened.fd), parts.inodes.start())
        parts.backing.after_meta.open()
    assert not parts.inodes.merge_stat(file.inode, late[1], late[0])
    for opened in (file, other):
        assert not parts.inodes.merge_stat(opened.inode, os.fstat(opened.fd), parts.inodes.start())
        assert len(parts.cached_pages(opened)) == 2
    assert parts.inodes.invalidations == before
    assert file.inode.attr is not None
    assert file.inode.attr.st_nlink == {"link": 3, "unlink": 1}.get(change, 2)


@pytest.mark.parametrize("flags", [0, 2])
@in_trio
async def test_a_change_by_others_before_our_rename_is_seen(make_parts: MakeParts, flags: int) -> None:
    parts = make_parts()
    file, root = parts.make("f", pages_of(1, 2)), parts.inodes.root
    other = parts.make("other", b"x")
    await parts.read(file, 0, 2 * PAGE_SIZE)
    (parts.directory / "f").write_bytes(page_of(3))
    await Namespace(parts).tree.rename(root, b"f", root, b"other", flags)
    assert parts.inodes.invalidations == 1
    assert await parts.read(file, 0, 1 << 20) == page_of(3)
    assert file.inode.locations == [(root, b"other")]
    assert other.inode.locations == ([(root, b"f")] if flags else [])
