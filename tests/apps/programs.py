"""Descriptions of trees, for comparisons."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

Options = tuple[str, ...]
Node = tuple[object, ...]


def snapshot(top: Path, *, ignored: tuple[str, ...] = ()) -> dict[str, Node]:
    """Return everything that a copy of a tree must keep, by name."""
    names: dict[tuple[int, int], list[str]] = {}
    nodes: dict[str, tuple[os.stat_result, Node]] = {}
    for directory, directories, files in os.walk(top):
        directories[:] = [name for name in directories if name not in ignored]
        for name in (".", *directories, *files):
            path = os.path.join(directory, name)
            if name == "." and directory != os.fspath(top):
                continue
            info = os.lstat(path)
            relative = os.path.relpath(path, top)
            nodes[relative] = info, _describe(path, info)
            names.setdefault((info.st_dev, info.st_ino), []).append(relative)
    return {
        relative: (*node, () if stat.S_ISDIR(info.st_mode) else tuple(sorted(names[info.st_dev, info.st_ino])))
        for relative, (info, node) in nodes.items()
    }


def _describe(path: str, info: os.stat_result) -> Node:
    """Describe one node."""
    attributes = {
        name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
    }
    content: object = None
    size = info.st_size
    if stat.S_ISREG(info.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(info.st_mode):
        content = os.readlink(path)
    elif stat.S_ISDIR(info.st_mode):
        size = 0
    links = 0 if stat.S_ISDIR(info.st_mode) else info.st_nlink
    return info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, size, links, info.st_rdev, attributes, content
