"""One process of a torture: a stream of operations on files of its own, on files of all, and on a file without a lock.

    python -m tests.torture.worker MOUNT PLAIN BACKING NUMBER PROCESSES SEED OPERATIONS FLAGS

Files of all are used under a lock that covers both sides, so that both see the operations in one order. The file
without a lock is one on which each process has stripes of bytes of its own, most pages being parts of several
processes' stripes: what is read must be what this process wrote there last, whatever the others do.

FLAGS: `through` compares the file in the backing after each write that needs no flush; `trace` prints every operation
before it is carried out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.torture.generator import FILES, Chooser
from tests.torture.pair import Difference, Pair, describe, explain
from tests.torture.replica import Op, content

SHARED = 0.25  # of the operations are on files of all
STRIPED = 0.15  # and these on the file without a lock
STRIPE = 1500  # bytes
STRIPED_BYTES = 900_000
FOUND = 3  # exit status: the sides differ


@dataclass(frozen=True, slots=True)
class Places:
    """Where the mount, its twin and the backing are."""

    mount: Path
    plain: Path
    backing: Path

    def pair(self, name: str) -> Pair:
        """Return the pair of a directory, made if need be."""
        for root in (self.plain, self.mount):
            (root / name).mkdir(exist_ok=True)
        return Pair(self.mount / name, self.plain / name, self.backing / name, self.mount / ".tmemfs")


class Stripes:
    """This process's bytes of the file without a lock."""

    def __init__(self, places: Places, number: int, processes: int, source: random.Random) -> None:
        self._number, self._processes, self._random = number, processes, source
        self._fds = [os.open(root / "striped", os.O_RDWR) for root in (places.plain, places.mount)]

    def step(self) -> None:
        """Write or read a piece of a stripe. Raise Difference when what is read is not what was written."""
        stripe = self._random.randrange(STRIPED_BYTES // STRIPE // self._processes) * self._processes + self._number
        begin = self._random.randrange(STRIPE)
        size = self._random.randint(1, STRIPE - begin)
        offset = stripe * STRIPE + begin
        if self._random.random() < 0.6:
            data = content(self._random.randrange(1 << 30), size)
            for fd in self._fds:
                os.pwrite(fd, data, offset)
        else:
            plain, mounted = (os.pread(fd, size, offset) for fd in self._fds)
            if plain != mounted:
                raise Difference(f"striped, {size} bytes at {offset}: {explain(plain, mounted)}")

    def close(self) -> None:
        """Close the file."""
        for fd in self._fds:
            os.close(fd)


class Worker:
    """One process of a torture."""

    def __init__(self, places: Places, number: int, processes: int, seed: int, flags: set[str]) -> None:
        self._flags = flags
        self._chooser = Chooser(seed)
        self.own = places.pair(f"own{number}")
        self.shared = places.pair("shared")
        self._lock = os.open(places.plain.parent / "lock", os.O_RDWR | os.O_CREAT)
        self._stripes = Stripes(places, number, processes, self._chooser.random) if processes > 1 else None
        self._alone = processes == 1
        self._last: Pair = self.own

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Be the only process that uses files of all, on both sides."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def run(self, operations: int) -> None:
        """Carry out so many operations, then compare the trees. Raise Difference."""
        chooser = self._chooser
        for _ in range(operations):
            what = chooser.random.random()
            if what < STRIPED and self._stripes is not None:
                self._stripes.step()
            elif what < STRIPED + SHARED:
                op = chooser.next()
                with self._turn():
                    self._step(self.shared, op)
            else:
                self._step(self.own, chooser.next())
        self.own.compare()
        with self._turn():
            self.shared.compare()
        self.own.close()
        self.shared.close()
        if self._stripes is not None:
            self._stripes.close()

    def _step(self, pair: Pair, op: Op) -> None:
        self._last = pair
        if "trace" in self._flags:
            print(os.fspath(pair.plain.root.name), describe(op), flush=True)
        pair.run(op)
        # A write that was acknowledged is in the backing, unless bytes wait in a mapping.
        if "through" in self._flags and op[0] in ("pwrite", "ftruncate") and not pair.mounted.maps and pair is self.own:
            slot = pair.mounted.slots.get(op[1])
            if slot is not None and self._chooser.random.random() < 0.2:
                pair.compare_backing()

    def report(self) -> str:
        """Return the last operations of the pair that was used last."""
        return "\n".join(f"  {describe(op)}" for op in self._last.history)


def main(words: list[str]) -> int:
    """Run one worker."""
    mount, plain, backing, number, processes, seed, operations = words[:7]
    places = Places(Path(mount), Path(plain), Path(backing))
    worker = Worker(places, int(number), int(processes), int(seed), set(words[7:]))
    try:
        worker.run(int(operations))
    except (Difference, OSError) as error:
        kind = "" if isinstance(error, Difference) else f"{type(error).__name__}: "
        root = worker._last.plain.root.name
        print(f"worker {number}, seed {seed}: {kind}{error}\nits last operations in {root}/:\n{worker.report()}")
        return FOUND
    done = worker.own.told + worker.shared.told
    print(f"{done} of {worker.own.done + worker.shared.done} operations had something to do; names: {len(FILES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
