"""Run the loads of busy guests: zipf reads by fio, traces replayed as file reads, and programs. All are seeded."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.tools import fio, traces
from bench.tools.children import BenchError, end, start
from bench.tools.content import PAGE_SIZE, write_half_compressible

BLOCK = 16 << 10
JOBS = 3
SKEW = 0.7
SECONDS = 240.0  # limit for one step of a guest


@dataclass(frozen=True, slots=True)
class Done:
    """The time of a step, and the latencies of its requests if they were measured."""

    seconds: float
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)


# -- fio -------------------------------------------------------------------------------------------------------------


def make_blocks(source: Path, size: int, seed: int) -> None:
    """Write the one file that fio reads."""
    write_half_compressible(source / "blocks", size // PAGE_SIZE, seed=seed)


def zipf(places: Sequence[Path], requests: int, seed: int) -> Done:
    """Read blocks of all places at the same time, with a zipf distribution."""
    children = []
    try:
        for number, place in enumerate(places):
            children.append(start(_fio(place, requests, seed * 10 + number), stdout=subprocess.PIPE))
        outputs = [_finish(child) for child in children]
    finally:
        for child in children:
            end(child, patience=1.0)
    reads = [fio.parse(output) for output in outputs]
    # fio's own time of the reads: its start and end take a third of a step, the same in every arm.
    seconds = max(read.seconds for read in reads)
    return Done(seconds, [read.latency_p50 for read in reads], [read.latency_p99 for read in reads])


def _fio(place: Path, requests: int, seed: int) -> list[str]:
    return [
        *fio.COMMAND,
        "--name=zipf",
        f"--filename={place / 'blocks'}",
        "--rw=randread",
        f"--random_distribution=zipf:{SKEW}",
        f"--bs={BLOCK}",
        f"--numjobs={JOBS}",
        f"--io_size={requests // JOBS * BLOCK}",
        f"--randseed={seed}",
    ]


def _finish(child: subprocess.Popen[bytes]) -> bytes:
    try:
        output, _ = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchError(f"a guest was busy for more than {SECONDS:g} s") from None
    if child.returncode != 0:
        raise BenchError(f"a guest's program ended with {child.returncode}")
    return output


# -- traces ----------------------------------------------------------------------------------------------------------


def make_replay(source: Path, trace: Path, limit: int, seed: int) -> int:
    """Write the file that a trace reads, and the numbers of its pages; return how many pages the file has."""
    numbers: dict[int, int] = {}
    order = [numbers.setdefault(page, len(numbers)) for page in traces.read(trace, limit)]
    write_half_compressible(source / "pages", len(numbers), seed=seed)
    (source / "order").write_text("\n".join(map(str, order)))
    return len(numbers)


def replays(sources: Sequence[Path], places: Sequence[Path]) -> Done:
    """Replay in all guests at the same time."""
    return _programs(
        [
            [sys.executable, "-m", "bench.subjects.guestloads", str(source / "order"), str(place / "pages")]
            for source, place in zip(sources, places, strict=True)
        ]
    )


def _replay(order: Path, file: Path) -> None:
    """Read the pages of a file in an order; the child process runs this."""
    with open(file, "rb", buffering=0) as pages:
        for line in order.read_text().split():
            pages.seek(int(line) * PAGE_SIZE)
            if len(pages.read(PAGE_SIZE)) != PAGE_SIZE:
                raise BenchError("a page came back short")


# -- programs --------------------------------------------------------------------------------------------------------

_PACKAGES = ("json", "email", "logging", "importlib", "unittest")
_IMPORTS = "import json, email.mime.text, email.parser, logging.handlers, importlib.metadata"
_HEADERS = 300
_SOURCES = 1
_ROWS = 24_000
_QUERIES = 80
_PASSES = 2  # in a step


def make_programs(source: Path, seed: int) -> None:
    """Copy parts of the standard library and of the C headers; write C sources and a database with an index."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in _PACKAGES:
        skipped = shutil.ignore_patterns("test*", "__pycache__")
        shutil.copytree(library / package, source / "library" / package, ignore=skipped)
    (source / "include").mkdir()
    for header in sorted(Path("/usr/include").glob("*.h"))[:_HEADERS]:
        shutil.copyfile(header, source / "include" / header.name)
    for number in range(_SOURCES):
        lines = [f"#include <{name}.h>" for name in ("stdio", "string", "errno")]
        body = "\n".join(
            f'int f{number}_{at}(int x) {{ return x * {at} + (int) strlen("{at}"); }}' for at in range(200)
        )
        (source / f"part{number}.c").write_text("\n".join(lines) + "\n" + body + "\n")
    draw = random.Random(seed)
    with sqlite3.connect(source / "rows.db") as database:
        database.execute("create table rows (id integer primary key, name text, body text)")
        rows = ((f"{draw.getrandbits(40):x}", f"{draw.getrandbits(512):x}" * 2) for _ in range(_ROWS))
        database.executemany("insert into rows (name, body) values (?, ?)", rows)
        database.execute("create index by_name on rows (name)")
    database.close()


def programs(places: Sequence[Path], seed: int) -> Done:
    """Build, search, query and import in all places at the same time."""
    query = (
        "import sqlite3, random, sys; d = sqlite3.connect('file:' + sys.argv[1] + '?immutable=1', uri=True);"
        f" r = random.Random({seed});"
        f" ids = [r.randrange({_ROWS}) for _ in range({_QUERIES})];"
        " [d.execute('select body from rows where id = ?', (one,)).fetchone() for one in ids];"
        " d.execute('select count(*) from rows where body like \"%00ff%\"').fetchone()"
    )
    commands = []
    for place in places:
        compiles = " && ".join(
            f"cc -c -I '{place}/include' -o /dev/null '{place}/part{number}.c'" for number in range(_SOURCES)
        )
        grep = f"grep -r -c import '{place}/library' > /dev/null"
        imports = f"PYTHONDONTWRITEBYTECODE=1 PYTHONPATH='{place}/library' '{sys.executable}' -S -c '{_IMPORTS}'"
        script = f"{compiles} && {grep} && '{sys.executable}' -S -c \"$QUERY\" '{place}/rows.db' && {imports}"
        commands.append(["env", f"QUERY={query}", "sh", "-c", " && ".join([script] * _PASSES)])
    return _programs(commands)


def _programs(commands: Sequence[Sequence[str]]) -> Done:
    began = time.monotonic()
    children = []
    try:
        for command in commands:
            children.append(start(command, stdout=subprocess.PIPE))
        for child in children:
            _finish(child)
    finally:
        for child in children:
            end(child, patience=1.0)
    return Done(time.monotonic() - began)


if __name__ == "__main__":
    _replay(Path(sys.argv[1]), Path(sys.argv[2]))
