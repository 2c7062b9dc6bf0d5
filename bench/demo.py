"""Show what the cache does: a real workload, twice, over real files on a slow directory.

Copies parts of the Python standard library, the C headers and /usr/lib into a temporary directory (files of
32 KiB to 8 MiB: what small files cost is their open, which asks the backing every time), mounts tmemfs over it with
a backing as slow as a share behind a 50 Mbit/s link (2 ms a request, 6 MiB/s), attributes kept for a minute (so that
the second pass shows what data costs, not names), a cache of 16M, which is a fraction
of the files, and a pool of 128M, and lets tar and grep read everything, twice. Shows the time of both passes and
the counters, checks that tar and grep gave through the mount what they give on the files themselves, unmounts, and
leaves nothing behind, after a Ctrl-C neither.

    python -m bench.demo
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.tools.children import BenchError, interruptible, undisturbed
from bench.tools.content import MIB
from bench.tools.harness import Mounted, tmemfs, workspace
from bench.tools.workload import Ran, grep, tar

CACHE, POOL = 16 * MIB, 128 * MIB
THROTTLE = "latency=2ms,bandwidth=6M"
SMALLEST, LARGEST = MIB // 32, 8 * MIB
SECONDS = 300.0  # for one program
COUNTERS = {
    "cache_hits": "pages found in the cache",
    "precache_succ_gets": "pages found in the pool",
    "backing_pages": "pages read from the slow directory",
    "backing_reads": "reads of the slow directory",
    "precache_puts": "evicted pages put into the pool",
    "precache_dropped": "evicted pages that the pool was not offered",
}


def main() -> int:
    """Run the demonstration; return the exit code."""
    console = Console(highlight=False)
    with interruptible():
        try:
            return _run(console)
        except BenchError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            with undisturbed():
                console.print("interrupted; unmounted, nothing is left behind")
            return 130


def _run(console: Console) -> int:
    with workspace() as space:
        source = space / "files"
        places = _copy(source)
        files, size = _count(source)
        console.print(f"{files} real files, {size / MIB:.0f} MiB, from {', '.join(places)}")
        console.print(f"as a slow directory ({THROTTLE}), cache {CACHE // MIB}M, pool {POOL // MIB}M\n")
        columns = TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        # No refreshing in a thread of its own: children are started while the bar is shown.
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            expected = _read(progress, "the files themselves", source, files, size)
            options = ("--throttle", THROTTLE, "--attr-timeout", "60s")
            with tmemfs(source, space / "mount", *options, cache=CACHE, pool=POOL) as mount:
                first, first_counted = _pass(progress, "first pass", mount, files, size)
                second, second_counted = _pass(progress, "second pass", mount, files, size)
                ratio = mount.stats()["pool_compression_ratio"]
        _show(console, (first, second), (first_counted, second_counted), ratio)
        names = ("tar", "grep")
        wrong = [name for name in names if not expected[name].digest == first[name].digest == second[name].digest]
    if wrong:
        print(f"demo: {' and '.join(wrong)} read other bytes through the mount", file=sys.stderr)
        return 1
    console.print("tar and grep gave the same checksums as on the files themselves; unmounted")
    return 0


def _copy(target: Path) -> list[str]:
    """Copy real files; return what they are."""
    places = (
        ("the Python standard library", sysconfig.get_path("stdlib"), 16 * MIB),
        ("/usr/include", "/usr/include", 8 * MIB),
        ("/usr/lib", "/usr/lib", 40 * MIB),
    )
    found = []
    for number, (name, place, share) in enumerate(places):
        copied = 0
        for path in _files(Path(place)):
            if copied >= share:
                break
            if not SMALLEST <= path.stat().st_size <= LARGEST:
                continue
            there = target / str(number) / path.relative_to(place)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
            copied += there.stat().st_size
        if copied:
            found.append(name)
    return found


def _files(place: Path) -> Iterator[Path]:
    """Walk regular files in the order of their names."""
    for directory, names, files in os.walk(place):
        names[:] = sorted(name for name in names if name != "site-packages")
        for name in sorted(files):
            path = Path(directory, name)
            if path.is_file() and os.access(path, os.R_OK):
                yield path


def _count(directory: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in _files(directory)]
    return len(sizes), sum(sizes)


def _pass(
    progress: Progress, name: str, mount: Mounted, files: int, size: int
) -> tuple[dict[str, Ran], dict[str, int]]:
    """Run the workload through the mount; return it with how far the counters grew."""
    before = mount.stats()
    ran = _read(progress, name, mount.path, files, size)
    return ran, mount.since(before, *COUNTERS)


def _read(progress: Progress, name: str, place: Path, files: int, size: int) -> dict[str, Ran]:
    """Let tar read every byte, then grep."""
    ran = {}
    for program, run, total in (("tar", tar, size), ("grep", grep, files)):
        task = progress.add_task(f"{name}: {program}", total=total)

        def show(done: int, task: int = task) -> None:
            progress.update(task, completed=done)  # type: ignore[arg-type]  # rich's TaskID is an int
            progress.refresh()

        ran[program] = run(place, show, SECONDS)
        progress.update(task, completed=total)
        progress.refresh()
        progress.stop_task(task)
    return ran


def _show(
    console: Console,
    passes: tuple[dict[str, Ran], dict[str, Ran]],
    counted: tuple[dict[str, int], dict[str, int]],
    compression: float,
) -> None:
    table = Table("", "first pass", "second pass", "", box=None, pad_edge=False)
    for column in table.columns[1:3]:
        column.justify = "right"
    times = [sum(ran.seconds for ran in one.values()) for one in passes]
    for program in passes[0]:
        first, second = (one[program].seconds for one in passes)
        table.add_row(f"{program}, seconds", f"{first:.2f}", f"{second:.2f}", f"{first / second:.1f} × faster")
    table.add_row("both, seconds", f"{times[0]:.2f}", f"{times[1]:.2f}", f"{times[0] / times[1]:.1f} × faster")
    for name, meaning in COUNTERS.items():
        table.add_row(name, f"{counted[0][name]:,}", f"{counted[1][name]:,}", meaning)
    console.print()
    console.print(table)
    console.print(f"the pool holds {compression:.1f} × the bytes that it takes\n")


if __name__ == "__main__":
    sys.exit(main())
