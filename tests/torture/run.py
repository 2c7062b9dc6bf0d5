"""One torture run: a mount in some mode, processes that use it, remounts, and a comparison of the trees."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import Place
from tests.mounted import VARIANTS, Mounted
from tests.torture.trees import first_difference
from tests.torture.worker import STRIPED_BYTES

WORKER_SECONDS = 180.0  # less than the watchdog of a mount

MODES: dict[str, tuple[str, ...]] = {
    "through": (),
    "writeback": ("--writeback",),
    "watch": ("--watch",),
    "threads": VARIANTS["threads"],
    "nopool": VARIANTS["nopool"],
    "watchback": ("--watch", "--writeback"),
    "threadsback": (*VARIANTS["threads"], "--writeback"),
    "notimeout": ("--attr-timeout", "0"),
    "negative": ("--negative-timeout", "1"),
}


class TortureError(AssertionError):
    """A run found a difference; the message says which, and how to repeat the run."""


@dataclass(frozen=True, slots=True)
class Torture:
    """The parameters of one run; they determine every operation."""

    seed: int
    mode: str
    processes: int
    mounts: int
    operations: int  # of each process on each mount
    trace: bool = False

    @classmethod
    def of_seed(cls, seed: int, mode: str | None = None, processes: int | None = None) -> Torture:
        """Derive a run from its seed, except for the parameters given."""
        source = random.Random(seed)
        chosen = source.choice(list(MODES)), source.choice((1, 2, 3))
        return cls(seed, mode or chosen[0], processes or chosen[1], 3, 2400 // (processes or chosen[1]) + 400)

    def __str__(self) -> str:
        """Return the parameters as `make torture` takes them."""
        return f"SEED={self.seed} MODE={self.mode} PROCESSES={self.processes}"

    def run(self, place: Place, plain: Path) -> int:
        """Run it and return the number of operations. Raise TortureError."""
        mounted = Mounted(place)
        (place.source / "striped").write_bytes(bytes(STRIPED_BYTES))
        (plain / "striped").write_bytes(bytes(STRIPED_BYTES))
        source = random.Random(self.seed)
        try:
            for _ in range(self.mounts):
                pool = source.choice((("--pool", "256K"), ("--pool", "1M"), ("--pool", "4M")))
                mounted.start(*pool, *MODES[self.mode])
                seeds = [source.randrange(1 << 32) for _ in range(self.processes)]
                self.run_workers(place, mounted, plain, seeds)
                self._require_none(first_difference(plain, place.mountpoint), "through the mount")
                mounted.end()
                self._require_none(first_difference(plain, place.source), "in the backing")
        finally:
            mounted.stop_watchdog()
        return self.mounts * self.processes * self.operations

    def run_workers(self, place: Place, mounted: Mounted, plain: Path, seeds: list[int]) -> None:
        """Run one worker for each seed. Raise TortureError."""
        workers = [self._start(place, plain, number, seed) for number, seed in enumerate(seeds)]
        failures = []
        for number, worker in enumerate(workers):
            try:
                output, errors = worker.communicate(timeout=WORKER_SECONDS)
            except subprocess.TimeoutExpired:
                # A process that hangs in the mount can be killed only after the mount has ended.
                assert mounted.process is not None
                mounted.process.kill()
                worker.kill()
                output, errors = worker.communicate(timeout=WORKER_SECONDS)
                failures.append(
                    f"worker {number} was not done in {WORKER_SECONDS} s: {output[-6000:]} {errors[-2000:]}"
                )
                continue
            if worker.returncode:
                failures.append(f"{output[-6000:]}{errors[-2000:]}")
            elif self.trace:
                print(output)
        if failures:
            found = "\n".join(failures)
            raise TortureError(f"{found}\nlog of the mount:\n{mounted.log()[-2000:]}")

    def _start(self, place: Place, plain: Path, number: int, seed: int) -> subprocess.Popen[str]:
        flags = ["through"] if "back" not in self.mode else []
        words = [place.mountpoint, plain, place.source, number, self.processes, seed, self.operations]
        command = [sys.executable, "-m", "tests.torture.worker", *map(str, words), *flags]
        return place.start(*command, *(["trace"] if self.trace else []))

    def _require_none(self, difference: str | None, where: str) -> None:
        if difference is not None:
            raise TortureError(f"the trees differ {where} at the end: {difference}")
