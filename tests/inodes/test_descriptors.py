"""O_PATH descriptors: bounded, reopened by parent and name, verified, closed exactly once."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.guestparts import MakeParts, make_parts
from tmemfs.inodes.descriptors import PATH_FLAGS, Descriptors, Located

__all__ = ["make_parts"]


class Node:
    """An inode, as far as the table is concerned."""

    def __init__(self, path: Path, *locations: tuple[Node, bytes]) -> None:
        st = os.lstat(path)
        self.key = (st.st_dev, st.st_ino)
        self.locations: list[tuple[Located, bytes]] = list(locations)
        self.open_descriptors: list[int] = []


class Tree:
    """A directory with files, and the table under test."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.table = Descriptors(limit)
        self.root = Node(directory)
        self.table.pin(self.root, os.open(directory, os.O_PATH))

    def node(self, name: str) -> Node:
        path = self.directory / name
        path.write_text(name)
        return Node(path, (self.root, os.fsencode(name)))

    def content(self, node: Node) -> str:
        with self.table.use(node) as fd:
            return Path(f"/proc/self/fd/{fd}").read_text()


def open_paths() -> list[str]:
    """Return the paths that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path, 8)
    yield made
    made.table.check()
    made.table.close()
    assert [path for path in open_paths() if path.startswith(os.fspath(tmp_path))] == [], "a descriptor leaked"


def test_many_more_inodes_than_descriptors_can_be_used(tree: Tree) -> None:
    nodes = [tree.node(f"f{number}") for number in range(200)]
    for number, node in enumerate(nodes + nodes[::-1]):
        assert tree.content(node) == f"f{min(number, 399 - number)}"
        tree.table.check()
    assert len(tree.table) <= 9


def test_a_descriptor_in_use_is_not_closed_to_make_room(tree: Tree) -> None:
    first = tree.node("first")
    with tree.table.use(first) as fd:
        for number in range(50):
            tree.content(tree.node(f"f{number}"))
        os.fstat(fd)


def test_a_descriptor_dropped_while_in_use_is_closed_by_its_last_user(tree: Tree) -> None:
    node = tree.node("f")
    with tree.table.use(node) as fd:
        with tree.table.use(node) as same:
            assert same == fd
            tree.table.drop(node)
        os.fstat(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_renamed_file_is_found_under_its_other_name(tree: Tree) -> None:
    node = tree.node("f")
    os.link(tree.directory / "f", tree.directory / "g")
    os.unlink(tree.directory / "f")
    node.locations.append((tree.root, b"g"))
    assert tree.content(node) == "f"


def test_a_name_of_another_file_is_stale(tree: Tree) -> None:
    node = tree.node("f")
    os.rename(tree.directory / "f", tree.directory / "kept")
    tree.node("f")
    with pytest.raises(OSError, match="tale") as caught, tree.table.use(node):
        pass
    assert caught.value.errno == errno.ESTALE


def test_a_call_with_a_dead_descriptor_is_retried_by_another_name(tree: Tree) -> None:
    node = tree.node("f")
    with tree.table.use(node) as first:
        pass
    os.link(tree.directory / "f", tree.directory / "g")
    node.locations.append((tree.root, b"g"))
    os.unlink(tree.directory / "f")
    seen = []

    def call(fd: int) -> str:
        seen.append(fd)
        if len(seen) == 1:  # as where each name is a node of its own
            raise FileNotFoundError(errno.ENOENT, "")
        return Path(f"/proc/self/fd/{fd}").read_text()

    assert tree.table.call(node, call) == "f"
    assert seen[0] == first
    assert tree.content(node) == "f"
    os.unlink(tree.directory / "g")
    seen.clear()
    with pytest.raises(FileNotFoundError):
        tree.table.call(node, call)
    assert len(seen) == 1, "no name leads to it"


def test_a_file_is_found_by_its_name_in_another_directory(tree: Tree) -> None:
    for name in ("a", "b"):
        (tree.directory / name).mkdir()
    a, b = (Node(tree.directory / name, (tree.root, name.encode())) for name in ("a", "b"))
    (tree.directory / "a" / "f").write_text("f")
    os.link(tree.directory / "a" / "f", tree.directory / "b" / "f")
    node = Node(tree.directory / "b" / "f", (a, b"f"), (b, b"f"))
    os.unlink(tree.directory / "a" / "f")
    os.rmdir(tree.directory / "a")
    assert tree.content(node) == "f"


def test_a_pinned_descriptor_of_a_file_without_a_name_stays(tree: Tree) -> None:
    node = tree.node("f")
    tree.table.pin(node, os.open(tree.directory / "f", PATH_FLAGS))
    os.unlink(tree.directory / "f")
    node.locations.clear()
    for number in range(50):
        tree.content(tree.node(f"f{number}"))
    assert tree.content(node) == "f"


def test_pinning_twice_keeps_one_descriptor(tree: Tree) -> None:
    node = tree.node("f")
    with tree.table.use(node) as fd:
        tree.table.pin(node, os.open(tree.directory / "f", PATH_FLAGS))
        with tree.table.use(node) as same:
            assert same == fd


def test_a_symbolic_link_is_not_followed(tree: Tree) -> None:
    os.symlink("/etc/passwd", tree.directory / "link")
    link = Node(tree.directory / "link", (tree.root, b"link"))
    with tree.table.use(link) as fd:
        assert os.readlink(b"", dir_fd=fd) == b"/etc/passwd"


def test_threads_share_the_table(tree: Tree) -> None:
    nodes = [tree.node(f"f{number}") for number in range(40)]
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for step in range(400):
                number = (start + step * 7) % 40
                assert tree.content(nodes[number]) == f"f{number}"
                if step % 50 == 0:
                    tree.table.drop(nodes[number])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_a_file_without_a_name_is_reached_through_an_open_descriptor(tree: Tree) -> None:
    node = tree.node("gone")
    fd = os.open(tree.directory / "gone", os.O_RDONLY)
    (tree.directory / "gone").unlink()
    try:
        node.open_descriptors.append(fd)
        assert tree.content(node) == "gone"
    finally:
        os.close(fd)


def test_a_close_that_hangs_does_not_block_the_last_user(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()
    go_on, begun = threading.Event(), threading.Event()
    close, hanging = os.close, set[int]()

    def hang(fd: int) -> None:
        if fd in hanging:
            hanging.clear()
            begun.set()
            go_on.wait(60)
        close(fd)

    async def main() -> None:
        file = parts.make("f", b"x")
        hanging.add(file.fd)
        with file.borrowed():
            parts.files.remove(file.number)
        assert not go_on.is_set(), "the user of the descriptor waited for close(2)"

    monkeypatch.setattr(os, "close", hang)
    timer = threading.Timer(30, go_on.set)
    timer.start()
    trio.run(main)
    assert begun.wait(30)
    timer.cancel()
    go_on.set()


def test_a_path_deeper_than_the_recursion_limit_can_be_opened(tree: Tree) -> None:
    node, above = tree.root, os.open(tree.directory, os.O_PATH)
    for _ in range(sys.getrecursionlimit() // 2):
        os.mkdir("d", dir_fd=above)
        below = os.open("d", PATH_FLAGS, dir_fd=above)
        os.close(above)
        above, st = below, os.fstat(below)
        node = Node(tree.directory, (node, b"d"))
        node.key = (st.st_dev, st.st_ino)
    os.close(above)
    with tree.table.use(node) as fd:
        assert os.fstat(fd).st_ino == node.key[1]


def test_a_descriptor_whose_stat_fails_is_closed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tree.node("f")

    def fail(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        with pytest.raises(OSError, match="Errno 5"):
            tree.table.use(node)
