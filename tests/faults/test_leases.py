"""A lease on a file of a local backing delays an open by up to 45 s: hits and stats go on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import SECONDS, Place, wait_until
from tests.mounted import Mounted
from tests.pagebytes import pages_of

pytestmark = [pytest.mark.mount, pytest.mark.root]

# The process keeps the lease until it ends.
HOLDER = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR)
signal.signal(signal.SIGIO, lambda *args: os.write(1, b"asked\\n"))
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
os.write(1, b"held\\n")
sys.stdin.readline()
"""
OPENER = "import os, sys; os.write(1, os.read(os.open(sys.argv[1], os.O_RDONLY), 4))"
OTHERS = """
fd = os.open("warm", os.O_RDONLY)
for _ in range(100):
    assert len(os.pread(fd, 4096, 8192)) == 4096 and os.stat("warm").st_size == 50 * 4096
assert sorted(os.listdir(".")) == ["leased", "warm"] and not os.path.exists("missing")
"""


@contextmanager
def holding(path: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds a lease on a file, inside the block."""
    words = (sys.executable, "-uc", HOLDER, path)
    process = subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def test_an_open_that_waits_for_a_lease_blocks_no_other_request(open_place: Place, mounted: Mounted) -> None:
    (open_place.source / "leased").write_bytes(b"data")
    (open_place.source / "warm").write_bytes(pages_of(2, 50))
    mounted.start()
    assert (mounted.root / "warm").read_bytes() == pages_of(2, 50)
    with holding(os.fspath(open_place.source / "leased")) as holder:
        assert holder.stdout is not None
        opener = open_place.start(sys.executable, "-c", OPENER, os.fspath(mounted.root / "leased"))
        assert holder.stdout.readline() == "asked\n"
        done = open_place.python(OTHERS)
        assert done.returncode == 0, done.stderr
        assert opener.poll() is None, "the open did not wait for the lease"
    wait_until(lambda: opener.poll() is not None, "the open has ended")
    assert opener.communicate()[0] == "data"
