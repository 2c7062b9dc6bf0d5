"""Names: nodes are made whole or not at all."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import pytest

from tests.parts import MakeParts, in_trio, make_parts
from tmemfs.names.tree import Tree

__all__ = ["make_parts"]


@dataclass(frozen=True)
class Caller:
    uid: int = 12_001
    gid: int = 13_001
    umask: int = 0o022


@pytest.mark.root
@in_trio
async def test_a_node_that_cannot_be_given_away_is_not_left_behind(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()
    tree, root = Tree(parts.backing, parts.inodes, parts.descriptors), parts.inodes.root

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
