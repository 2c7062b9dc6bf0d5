"""Two replicas, the mount and a plain directory: run each operation on both and compare the outcomes."""

from __future__ import annotations

import errno
import os
from collections import deque
from pathlib import Path

from tests.torture.replica import NOTHING, Op, Outcome, Replica
from tests.torture.trees import first_difference

HISTORY = 60
_NOT_SUPPORTED = ("ENOTSUP", "EOPNOTSUPP", "ENOSYS")


class Difference(AssertionError):
    """The mount and the plain directory disagree."""


class Pair:
    """A directory in the mount, the same in a plain tree, and the first as the backing has it."""

    def __init__(self, mounted: Path, plain: Path, backing: Path, control: Path) -> None:
        self.mounted = Replica(mounted)
        self.plain = Replica(plain)
        self._backing = backing
        self._control = control
        self.history: deque[Op] = deque(maxlen=HISTORY)
        self.done = 0
        self.effective = 0  # operations that found their slot

    def run(self, op: Op) -> Outcome:
        """Carry out an operation on both replicas. Raise Difference when they disagree."""
        self.history.append(op)
        self.done += 1
        if op[0] == "control":
            self._write_control(op[1], op[2])
            return None
        if op[0] == "punch":  # if the mount does not support it, the plain replica skips it
            mounted = self.mounted.run(op)
            if mounted in _NOT_SUPPORTED:
                return mounted
            plain = self.plain.run(op)
        else:
            plain = self.plain.run(op)
            mounted = self.mounted.run(op)
        self.effective += plain != NOTHING
        if plain != mounted:
            raise Difference(f"{describe(op)}: {explain(plain, mounted)}")
        return plain

    def _write_control(self, name: str, line: str) -> None:
        fd = os.open(self._control / name, os.O_WRONLY)
        try:
            os.write(fd, line.encode())
        except OSError as error:
            if (name, error.errno) != ("freeze", errno.EINVAL):  # without a pool there is nothing to freeze
                raise
        finally:
            os.close(fd)

    def compare(self) -> None:
        """Compare the whole trees through the mount. Raise Difference."""
        found = first_difference(self.plain.root, self.mounted.root)
        if found is not None:
            raise Difference(f"the tree, through the mount: {found}")

    def compare_backing(self) -> None:
        """Compare the plain tree with the backing. Raise Difference."""
        found = first_difference(self.plain.root, self._backing)
        if found is not None:
            raise Difference(f"the tree, in the backing: {found}")

    def close(self) -> None:
        """Close all files and mappings."""
        self.mounted.close()
        self.plain.close()


def describe(op: Op) -> str:
    """Return an operation as text that can be pasted into a test."""
    return f"{op[0]}({', '.join(repr(word) for word in op[1:])})"


def explain(plain: Outcome, mounted: Outcome) -> str:
    """Return how two outcomes differ; for bytes, where."""
    if not isinstance(plain, bytes) or not isinstance(mounted, bytes):
        return f"{_short(plain)} on the plain directory, {_short(mounted)} through the mount"
    if len(plain) != len(mounted):
        return f"{len(plain)} bytes on the plain directory, {len(mounted)} through the mount"
    wrong = [index for index, (one, other) in enumerate(zip(plain, mounted, strict=True)) if one != other]
    begin = wrong[0]
    return (
        f"{len(wrong)} of {len(plain)} bytes differ, from {begin} (page {begin // 4096}) to {wrong[-1]}: "
        f"{plain[begin : begin + 16].hex()} on the plain directory, "
        f"{mounted[begin : begin + 16].hex()} through the mount"
    )


def _short(outcome: Outcome) -> str:
    return f"{len(outcome)} bytes" if isinstance(outcome, bytes) else repr(outcome)
