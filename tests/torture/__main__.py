"""Start torture runs until the time is over.

    python -m tests.torture [--seconds 60] [--seed N] [--mode NAME] [--processes N] [--trace]

Prints its seed first. The first run has this seed, each later run the next number. A seed determines the mode, the
processes and their operations. It does not determine timing: how processes, evictions, compression and write-back by
age interleave. So a run of one process repeats the same operations in the same order; a run of several repeats each
process's stream.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import Place
from tests.torture.run import MODES, Torture


def main() -> int:
    """Start runs until the time is over or one finds a difference."""
    parser = argparse.ArgumentParser(prog="torture", description="Compare a mount with a plain directory.")
    parser.add_argument("--seconds", type=float, default=60.0, help="start new runs for this long (0: one run)")
    parser.add_argument("--seed", type=int, help="the first run's seed")
    parser.add_argument("--mode", choices=list(MODES))
    parser.add_argument("--processes", type=int)
    parser.add_argument("--trace", action="store_true", help="print every operation")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}", flush=True)
    began, operations, runs = time.monotonic(), 0, 0
    while runs == 0 or time.monotonic() < began + given.seconds:
        torture = Torture.of_seed(seed + runs, given.mode, given.processes)
        if given.trace:
            torture = Torture(**{field: getattr(torture, field) for field in torture.__slots__} | {"trace": True})
        count = _run(torture)
        if count is None:
            return 1
        operations += count
        runs += 1
    print(f"{runs} runs, {operations} operations, {time.monotonic() - began:.0f} s: no difference")
    return 0


def _run(torture: Torture) -> int | None:
    """Run one torture in a new directory. On a difference, keep the directory and return None."""
    directory = Path(tempfile.mkdtemp(prefix="tmemfs-torture-"))
    place = Place(directory)
    plain = directory / "plain"
    plain.mkdir()
    began = time.monotonic()
    try:
        count = torture.run(place, plain)
    except Exception as error:
        print(f"{error}\n{torture} found this; its files are in {directory}\nrepeat it: make torture {torture}")
        return None
    finally:
        place.clean()
    print(f"{torture}: {count} operations, {time.monotonic() - began:.1f} s", flush=True)
    shutil.rmtree(directory)
    return count


if __name__ == "__main__":
    sys.exit(main())
