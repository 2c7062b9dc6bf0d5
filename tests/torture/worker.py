"""One process of a torture: a stream of operations on its own files, on shared files and on a striped file.

    python -m tests.torture.worker MOUNT PLAIN BACKING NUMBER PROCESSES SEED OPERATIONS FLAGS

Shared files are used under a lock that covers both replicas, so that both see the operations in one order. The striped
file has no lock: each process has stripes of its own, and most pages are parts of several processes' stripes. A process
must read what it wrote there last, whatever the others do.

FLAGS: `through` compares the file in the backing after some of the writes that need no flush; `trace` prints every
operation before it is carried out.
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

from tests.torture.generator import FILES, OperationGenerator
from tests.torture.pair import Difference, Pair, describe, explain
from tests.torture.replica import Op, content

SHARED = 0.25  # of the operations are on shared files
STRIPED = 0.15  # and these on the striped file
STRIPE = 1500  # bytes
STRIPED_BYTES = 900_000
FOUND = 3  # exit status: the replicas differ


@dataclass(frozen=True, slots=True)
class Places:
    """The paths of the mount, the plain directory and the backing."""

    mount: Path
    plain: Path
    backing: Path

    def pair(self, name: str) -> Pair:
        """Create a directory in both trees if it is missing, and return the pair."""
        for root in (self.plain, self.mount):
            (root / name).mkdir(exist_ok=True)
        return Pair(self.mount / name, self.plain / name, self.backing / name, self.mount / ".tmemfs")


class Stripes:
    """This process's bytes of the striped file."""

    def __init__(self, places: Places, number: int, processes: int, source: random.Random) -> None:
        self._number, self._processes, self._random = number, processes, source
        self._fds = [os.open(root / "striped", os.O_RDWR) for root in (places.plain, places.mount)]

    def step(self) -> None:
        """Write or read a piece of a stripe. Raise Difference when the replicas differ."""
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
        self._stream = OperationGenerator(seed)
        self.own = places.pair(f"own{number}")
        self.shared = places.pair("shared")
        self._lock = os.open(places.plain.parent / "lock", os.O_RDWR | os.O_CREAT)
        self._stripes = Stripes(places, number, processes, self._stream.random) if processes > 1 else None
        self.last: Pair = self.own

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock of the shared files, on both replicas."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def run(self, operations: int) -> None:
        """Carry out `operations` operations, then compare the trees. Raise Difference."""
        stream = self._stream
        for _ in range(operations):
            what = stream.random.random()
            if what < STRIPED and self._stripes is not None:
                self._stripes.step()
            elif what < STRIPED + SHARED:
                op = stream.next()
                with self._turn():
                    self._step(self.shared, op)
            else:
                self._step(self.own, stream.next())
        self.own.compare()
        with self._turn():
            self.shared.compare()
        self.own.close()
        self.shared.close()
        if self._stripes is not None:
            self._stripes.close()

    def _step(self, pair: Pair, op: Op) -> None:
        self.last = pair
        if "trace" in self._flags:
            print(os.fspath(pair.plain.root.name), describe(op), flush=True)
        pair.run(op)
        # A write that was acknowledged is in the backing, unless bytes wait in a mapping.
        if "through" in self._flags and op[0] in ("pwrite", "ftruncate") and not pair.mounted.maps and pair is self.own:
            slot = pair.mounted.slots.get(op[1])
            if slot is not None and self._stream.random.random() < 0.2:
                pair.compare_backing()

    def report(self) -> str:
        """Return the last operations of the pair used last."""
        return "\n".join(f"  {describe(op)}" for op in self.last.history)


def main(words: list[str]) -> int:
    """Run one worker."""
    mount, plain, backing, number, processes, seed, operations = words[:7]
    places = Places(Path(mount), Path(plain), Path(backing))
    worker = Worker(places, int(number), int(processes), int(seed), set(words[7:]))
    try:
        worker.run(int(operations))
    except (Difference, OSError) as error:
        kind = "" if isinstance(error, Difference) else f"{type(error).__name__}: "
        root = worker.last.plain.root.name
        print(f"worker {number}, seed {seed}: {kind}{error}\nits last operations in {root}/:\n{worker.report()}")
        return FOUND
    done = worker.own.effective + worker.shared.effective
    print(f"{done} of {worker.own.done + worker.shared.done} operations found their slot; names: {len(FILES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
