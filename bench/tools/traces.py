"""Read traces, and replay them on all cores.

Two formats: gzip text with one page number a line, where `*` marks a break (LIRS); and zstd text with four numbers a
line: first block, number of blocks, ignored, request number (ARC). Other files of the directory are ignored.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import multiprocessing
import os
import shutil
import signal
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench.tools.children import BenchError, run

T = TypeVar("T")
R = TypeVar("R")

# In P3 a page is 8 blocks of 512 bytes; in OLTP, as the literature replays it, a block is a page.
_BLOCKS_A_PAGE = {"P3": 8}


def names(directory: Path) -> list[Path]:
    """Return the traces of a directory that can be read here, smallest file first."""
    found = [*directory.glob("*.trace.gz"), *directory.glob("*.lis.zst"), *directory.glob("*.lis")]
    return sorted(found, key=lambda path: (path.stat().st_size, path.name))


def arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of measures that replay traces."""
    command.add_argument("--traces", type=Path, help="directory with the traces")
    command.add_argument("--only", nargs="*", default=[], help="names of traces, without suffixes")
    command.add_argument("--limit", type=_natural, default=0, help="replay only the first so many requests of each")


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a number of requests")
    return int(text)


def title(path: Path) -> str:
    """Return the name of a trace without its suffixes."""
    return path.name.split(".")[0]


def read(path: Path, limit: int = 0) -> array[int]:
    """Return the page numbers of a trace, one a page requested; at most `limit` when that is not 0."""
    if path.name.endswith(".trace.gz"):
        with gzip.open(path, "rt") as lines:
            return _pages(lines, limit)
    text = path.read_bytes() if path.suffix == ".lis" else _unzstd(path)
    return _blocks(text.decode().splitlines(), _BLOCKS_A_PAGE.get(title(path), 1), limit)


def _pages(lines: Iterable[str], limit: int) -> array[int]:
    pages = array("q")
    for line in lines:
        word = line.strip()
        if word and word != "*":
            pages.append(int(word))
            if len(pages) == limit:
                break
    return pages


def _blocks(lines: Iterable[str], blocks_a_page: int, limit: int) -> array[int]:
    pages = array("q")
    for line in lines:
        words = line.split()
        if len(words) < 2:
            continue
        first, count = int(words[0]), int(words[1])
        last = (first + max(count, 1) - 1) // blocks_a_page
        pages.extend(range(first // blocks_a_page, last + 1))
        if limit and len(pages) >= limit:
            return pages[:limit]
    return pages


def _unzstd(path: Path) -> bytes:
    """Decompress with the zstandard package if it is installed, else with the zstd program."""
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        if shutil.which("zstd") is None:
            raise BenchError(f"{path.name} needs the zstd program: apt install zstd") from None
        return run(["zstd", "-dcq", path], seconds=60)
    with open(path, "rb") as file:
        data: bytes = zstandard.ZstdDecompressor().stream_reader(file).read()
    return data


def on_all_cores(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
    """Yield the results of `work` on each task as they arrive; one process a core, tasks in their order."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _ignore_interrupts) as workers:
        yield from workers.imap_unordered(work, tasks)


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C: the parent terminates its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
