"""Ordinary programs that read a directory, with a checksum of what they gave."""

from __future__ import annotations

import hashlib
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tools.children import BenchError, end, start

Show = Callable[[int], None]
_REFRESH_SECONDS = 0.1
_PATTERN = "import|include"


@dataclass(frozen=True, slots=True)
class Ran:
    """How long a program took, and the SHA-256 of what it gave."""

    seconds: float
    digest: str


def tar(directory: Path, show: Show, seconds: float) -> Ran:
    """Pack everything in the order of the names; `show` is told the bytes so far."""
    began = time.monotonic()
    digest, done, shown = hashlib.sha256(), 0, began
    # Owner and mode are in the archive too, so one checksum compares them with the content.
    for data in _output(["tar", "--sort=name", "-C", directory, "-cf", "-", "."], seconds):
        digest.update(data)
        done += len(data)
        if time.monotonic() - shown > _REFRESH_SECONDS:
            show(done)
            shown = time.monotonic()
    return Ran(time.monotonic() - began, digest.hexdigest())


def grep(directory: Path, show: Show, seconds: float) -> Ran:
    """Count the matching lines of every file; `show` is told the files so far."""
    began = time.monotonic()
    parts, done, shown = [], 0, began
    for data in _output(["grep", "-r", "-c", "-a", "-E", _PATTERN, directory], seconds):
        parts.append(data)
        done += data.count(b"\n")
        if time.monotonic() - shown > _REFRESH_SECONDS:
            show(done)
            shown = time.monotonic()
    took = time.monotonic() - began
    # Directories are walked in their own order, which is not the same on every filesystem.
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
