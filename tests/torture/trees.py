"""Compare two directory trees: names, types, modes, link counts, which names are one file, sizes and bytes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_CHUNK = 1 << 17


def first_difference(expected: Path, found: Path) -> str | None:
    """Return a description of the first difference, or None."""
    one, other = _walk(expected), _walk(found)
    if one.keys() != other.keys():
        return f"only in one of the two: {sorted(one.keys() ^ other.keys())}"
    for name, st in one.items():
        difference = _compare(expected / name, st, found / name, other[name])
        if difference is not None:
            return f"{name}: {difference}"
    groups, other_groups = _groups(one), _groups(other)
    if groups != other_groups:
        return f"names of one file: {groups} expected, {other_groups} found"
    return None


def _walk(root: Path) -> dict[str, os.stat_result]:
    found: dict[str, os.stat_result] = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = Path(directory, name)
            found[os.fspath(path.relative_to(root))] = path.lstat()
    return dict(sorted(found.items()))


def _groups(tree: dict[str, os.stat_result]) -> list[list[str]]:
    by_file: dict[tuple[int, int], list[str]] = {}
    for name, st in tree.items():
        by_file.setdefault((st.st_dev, st.st_ino), []).append(name)
    return sorted(by_file.values())


def _compare(expected: Path, one: os.stat_result, found: Path, other: os.stat_result) -> str | None:
    if one.st_mode != other.st_mode:
        return f"mode {stat.filemode(one.st_mode)} expected, {stat.filemode(other.st_mode)} found"
    if one.st_nlink != other.st_nlink:
        return f"{one.st_nlink} links expected, {other.st_nlink} found"
    if stat.S_ISLNK(one.st_mode):
        targets = os.readlink(expected), os.readlink(found)
        return None if targets[0] == targets[1] else f"target {targets[0]} expected, {targets[1]} found"
    if not stat.S_ISREG(one.st_mode):
        return None
    if one.st_size != other.st_size:
        return f"{one.st_size} bytes expected, {other.st_size} found"
    return _compare_bytes(expected, found)


def _compare_bytes(expected: Path, found: Path) -> str | None:
    with expected.open("rb") as one, found.open("rb") as other:
        offset = 0
        while True:
            left, right = one.read(_CHUNK), other.read(_CHUNK)
            if left != right:
                wrong = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(right))
                return f"the byte at {offset + wrong} (page {(offset + wrong) // 4096}) differs"
            if not left:
                return None
            offset += len(left)
