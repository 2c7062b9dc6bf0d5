"""Show what cache and pool do: tar and grep read real files on a slow directory, twice.

The files (32 KiB to 2 MiB) are copies from the Python standard library, the C headers and /usr/lib. Smaller ones would
show the cost of an open, which always asks the backing. Each program has a mount of its own with a pool, and one
without. The backing is as slow as a share behind a 70 Mbit/s link (2 ms a request, 8 MiB/s). Attributes are kept for a
minute, so that the second pass shows what data costs. The cache is a quarter of the files.

Prints the times of all passes and where the pages of the second came from, and compares the programs' output with that
on the files themselves. Unmounts and removes everything at the end, also after a Ctrl-C.

    python -m bench.demo
"""

from __future__ import annotations

import hashlib
import os
import selectors
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.tools.children import BenchError, end, interruptible, start, undisturbed
from bench.tools.content import MIB
from bench.tools.harness import tmemfs, workspace

CACHE, POOL = 4 * MIB, 64 * MIB
THROTTLE = "latency=2ms,bandwidth=8M"
SMALLEST, LARGEST = MIB // 32, 2 * MIB
SECONDS = 300.0  # for one program
SAME = 0.05  # smaller differences count as equal
COUNTERS = ("precache_succ_gets", "precache_reads", "backing_pages")


Show = Callable[[int], None]
_REFRESH_SECONDS = 0.1
_PATTERN = "import|include"


@dataclass(frozen=True, slots=True)
class Ran:
    """The time of a program, and the SHA-256 of its output."""

    seconds: float
    digest: str


def tar(directory: Path, show: Show, seconds: float) -> Ran:
    """Pack all files in order of their names; call `show` with the bytes so far."""
    began = time.monotonic()
    digest, done, shown = hashlib.sha256(), 0, began
    # The archive has owner and mode, too, so the checksum compares them as well.
    for data in _output(["tar", "--sort=name", "-C", directory, "-cf", "-", "."], seconds):
        digest.update(data)
        done += len(data)
        if time.monotonic() - shown > _REFRESH_SECONDS:
            show(done)
            shown = time.monotonic()
    return Ran(time.monotonic() - began, digest.hexdigest())


def grep(directory: Path, show: Show, seconds: float) -> Ran:
    """Count the matching lines of each file; call `show` with the files so far."""
    began = time.monotonic()
    parts, done, shown = [], 0, began
    for data in _output(["grep", "-r", "-c", "-a", "-E", _PATTERN, directory], seconds):
        parts.append(data)
        done += data.count(b"\n")
        if time.monotonic() - shown > _REFRESH_SECONDS:
            show(done)
            shown = time.monotonic()
    took = time.monotonic() - began
    # The order of directory entries differs between filesystems.
    prefix = os.fsencode(directory)
    lines = sorted(line.removeprefix(prefix) for line in b"".join(parts).splitlines())
    return Ran(took, hashlib.sha256(b"\n".join(lines)).hexdigest())


def _output(command: Sequence[str | Path], seconds: float) -> Iterator[bytes]:
    """Yield a program's output as it comes; BenchError when it fails or takes longer than `seconds`."""
    limit = time.monotonic() + seconds
    environment = os.environ | {"LC_ALL": "C"}
    with tempfile.TemporaryFile() as errors:
        child = start(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        try:
            assert child.stdout is not None
            with child.stdout as stream, selectors.DefaultSelector() as selector:
                selector.register(stream, selectors.EVENT_READ)
                while selector.select(max(0.0, limit - time.monotonic())):
                    data = os.read(stream.fileno(), 1 << 18)
                    if not data:
                        break
                    yield data
                else:
                    raise BenchError(f"{command[0]} did not end within {seconds:g} s")
            code = child.wait(5.0)
            if code != 0:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()[-300:]
                raise BenchError(f"{command[0]} failed with {code}: {said}")
        finally:
            end(child, patience=1.0)


PROGRAMS = {"tar": tar, "grep": grep}


@dataclass(frozen=True, slots=True)
class Passes:
    """Two passes of one program through one mount, and the source of the second's pages."""

    first: Ran
    second: Ran
    pool_pages: int
    backing_pages: int
    compression: float


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
        columns = TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        found: dict[str, tuple[Passes, Passes]] = {}
        wrong = []
        # No refresh thread: children are forked while the bar is shown.
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            for program in PROGRAMS:
                total = {"tar": size, "grep": files}[program]
                expected = _read(progress, f"{program}, the files", program, source, total)
                with_pool = _twice(progress, program, source, space / program, total, POOL)
                without = _twice(progress, program, source, space / f"{program}, no pool", total, 0)
                found[program] = with_pool, without
                read = (with_pool.first, with_pool.second, without.first, without.second)
                if any(ran.digest != expected.digest for ran in read):
                    wrong.append(program)
        console.print()
        console.print(_table(found))
        console.print(_conclusion(found) + "\n")
    if wrong:
        print(f"demo: {' and '.join(wrong)} read other bytes through the mount", file=sys.stderr)
        return 1
    console.print("tar and grep gave the same checksums as on the files themselves; unmounted")
    return 0


def _copy(target: Path) -> list[str]:
    """Copy real files; return the names of their origins."""
    places = (
        ("the Python standard library", sysconfig.get_path("stdlib"), 4 * MIB),
        ("/usr/include", "/usr/include", 2 * MIB),
        ("/usr/lib", "/usr/lib", 10 * MIB),
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
    """Yield readable regular files in order of their names."""
    for directory, names, files in os.walk(place):
        names[:] = sorted(name for name in names if name != "site-packages")
        for name in sorted(files):
            path = Path(directory, name)
            if path.is_file() and os.access(path, os.R_OK):
                yield path


def _count(directory: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in _files(directory)]
    return len(sizes), sum(sizes)


def _twice(progress: Progress, program: str, source: Path, mountpoint: Path, total: int, pool: int) -> Passes:
    """Run a program twice through a fresh mount."""
    name = program if pool else f"{program}, no pool"
    options = ("--throttle", THROTTLE, "--attr-timeout", "60s")
    with tmemfs(source, mountpoint, *options, cache=CACHE, pool=pool) as mount:
        first = _read(progress, f"{name}, first pass", program, mount.path, total)
        before = mount.stats()
        second = _read(progress, f"{name}, second pass", program, mount.path, total)
        counted = mount.since(before, *COUNTERS) if pool else mount.since(before, "backing_pages")
        compression = mount.stats()["pool_compression_ratio"] if pool else 1.0
    pooled = counted.get("precache_succ_gets", 0) + counted.get("precache_reads", 0)
    return Passes(first, second, pooled, counted["backing_pages"], compression)


def _read(progress: Progress, name: str, program: str, place: Path, total: int) -> Ran:
    """Let a program read all files; show its progress."""
    task = progress.add_task(name, total=total)

    def show(done: int) -> None:
        progress.update(task, completed=done)
        progress.refresh()

    ran = PROGRAMS[program](place, show, SECONDS)
    progress.update(task, completed=total)
    progress.refresh()
    progress.stop_task(task)
    return ran


def compared(before: float, now: float) -> str:
    """Return how much faster or slower something is now, as text."""
    if abs(now - before) <= SAME * before:
        return "as fast"
    return f"{before / now:.1f} × faster" if now < before else f"{now / before:.1f} × slower"


def _table(found: Mapping[str, tuple[Passes, Passes]]) -> Table:
    """Return a table with a column for each program, and its passes with and without a pool."""
    table = Table("", *found, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for number, arm in enumerate(("with a pool", "without a pool")):
        passes = [both[number] for both in found.values()]
        table.add_row(f"[bold]{arm}")
        table.add_row("first pass, seconds", *(f"{one.first.seconds:.2f}" for one in passes))
        table.add_row("second pass, seconds", *(f"{one.second.seconds:.2f}" for one in passes))
        table.add_row("  against the first", *(compared(one.first.seconds, one.second.seconds) for one in passes))
        table.add_row("  pages from the pool", *(f"{one.pool_pages:,}" for one in passes))
        table.add_row("  pages from the slow directory", *(f"{one.backing_pages:,}" for one in passes))
    return table


def _conclusion(found: Mapping[str, tuple[Passes, Passes]]) -> str:
    """Return a sentence about what the pool did for the second passes."""
    ours, theirs = (sum(both[number].second.seconds for both in found.values()) for number in (0, 1))
    pages = sum(both[0].pool_pages for both in found.values())
    held = max(both[0].compression for both in found.values())
    return (
        f"The pool gave the second passes {pages:,} pages that the cache had no room for: {ours:.2f} s with it, "
        f"{theirs:.2f} s without ({compared(theirs, ours)}). It holds {held:.1f} × the bytes that it takes."
    )


if __name__ == "__main__":
    sys.exit(main())
