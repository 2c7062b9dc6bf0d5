"""Two hundred readers hang in one file of the backing: hits, other files, stats and unmounting go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Place, run, wait_until
from tests.fs.failing import FailingBacking, backing
from tests.mounted import Mounted
from tests.pagebytes import pages_of
from tmemfs.lifecycle.remotemount import RemoteMount

__all__ = ["backing"]

pytestmark = [pytest.mark.mount, pytest.mark.root]
READERS = 200
PAGES = 300

# Each thread writes a byte to standard output before it reads.
READER = """
import os, sys, threading
def read(number):
    fd = os.open(sys.argv[1], os.O_RDONLY)
    os.write(1, b".")
    os.pread(fd, 4096, 4096 * number)
threads = [threading.Thread(target=read, args=(number,)) for number in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""

# Each child writes a byte before it touches its own part of the mapping.
MAPPER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapping = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
for number in range(int(sys.argv[2])):
    if os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        mapping[number << 17]
        os._exit(0)
for number in range(int(sys.argv[2])):
    os.wait()
"""


@pytest.fixture
def hanging(backing: FailingBacking) -> FailingBacking:
    """Create files in the backing: one that hangs, one that is cached, and one that is not."""
    (backing.directory / "stuck").write_bytes(pages_of(1, PAGES))
    (backing.directory / "warm").write_bytes(pages_of(2, 50))
    (backing.directory / "cold").write_bytes(pages_of(3, 50))
    return backing


def stuck_readers(place: Place, hanging: FailingBacking, options: tuple[str, ...]) -> subprocess.Popen[str]:
    """Mount, read one file into the cache, and start readers of the file that hangs."""
    mounted = Mounted(place)
    mounted.start("--attr-timeout", "60", *options)
    mounted.stop_watchdog()  # the test's own waits are shorter
    assert (place.mountpoint / "warm").read_bytes() == pages_of(2, 50)
    os.listdir(place.mountpoint)
    hanging.fail("read stuck hang")
    readers = place.start(sys.executable, "-c", READER, os.fspath(place.mountpoint / "stuck"), str(READERS))
    assert readers.stdout is not None
    assert len(readers.stdout.read(READERS)) == READERS
    tasks = Path(f"/proc/{readers.pid}/task")
    wait_until(lambda: sum(_is_stuck(task) for task in tasks.iterdir()) == READERS, "all readers wait")
    return readers


def _is_stuck(task: Path) -> bool:
    """Return whether a thread waits for FUSE."""
    return "request_wait_answer" in (task / "stack").read_text()


def in_time(seconds: float, place: Place, code: str) -> None:
    """Run Python in the mount, in a process that can be killed; assert that it is fast."""
    began = time.monotonic()
    done = place.python(code)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < seconds


@pytest.mark.parametrize("options", [(), ("--writeback",)], ids=["through", "writeback"])
def test_200_hanging_readers_block_no_other_request(
    place: Place, hanging: FailingBacking, options: tuple[str, ...]
) -> None:
    readers = stuck_readers(place, hanging, options)
    in_time(30, place, "assert len(open('warm', 'rb').read()) == 50 * 4096")
    in_time(30, place, "assert len(open('cold', 'rb').read()) == 50 * 4096")
    in_time(30, place, "assert os.stat('stuck').st_size and len(os.listdir('.')) == 3")
    in_time(30, place, "assert 'cache_hits' in open('stats').read() + open('.tmemfs/metrics').read()")
    remote = RemoteMount(place.mountpoint)
    for name in ("stats", "stats.json", "config"):
        assert remote.read(name)
    remote.write("cache_size", b"3M")
    in_time(30, place, "open('new', 'wb').write(b'x' * 9000); assert len(open('new', 'rb').read()) == 9000")
    in_time(30, place, "open('.tmemfs/drop_caches', 'w').write('1'); open('.tmemfs/cache_size', 'w').write('2M')")
    hits = "import time; fd = os.open('warm', os.O_RDONLY); os.pread(fd, 204800, 0)\n"
    in_time(60, place, hits + "for _ in range(5000): assert len(os.pread(fd, 4096, 8192)) == 4096")
    hanging.fail()
    readers.communicate(timeout=60)
    assert readers.returncode == 0
    assert (hanging.directory / "new").stat().st_size == 9000
    in_time(30, place, f"assert len(open('stuck', 'rb').read()) == {PAGES} * 4096")


def test_umount_ends_a_mount_with_200_hanging_readers(place: Place, hanging: FailingBacking) -> None:
    """umount reports a busy mount; a lazy one returns at once, and a second signal ends the guest and its readers."""
    readers = stuck_readers(place, hanging, ())
    words = (sys.executable, "-m", "tmemfs", "umount", place.mountpoint)
    busy = run(*words)
    assert busy.returncode != 0
    assert "in use" in busy.stderr
    guest = int(place.logged_pid())
    os.kill(guest, signal.SIGTERM)
    wait_until(lambda: not place.is_mounted(), "the mount is gone from the table")
    os.kill(guest, signal.SIGTERM)
    readers.communicate(timeout=60)  # their reads failed: the threads report it and end
    hanging.fail()
    wait_until(lambda: "ended" in place.log_text().splitlines()[-1], "the guest has ended")


def test_a_hanging_page_fault_does_not_delay_faults_of_other_files(place: Place, hanging: FailingBacking) -> None:
    """The kernel bounds the number of background requests of all files together."""
    mappers = 24
    (hanging.directory / "stuck").write_bytes(pages_of(1, mappers * 32))
    mounted = Mounted(place)
    mounted.start("--attr-timeout", "60")
    mounted.stop_watchdog()
    assert len(os.listdir(place.mountpoint)) == 3
    hanging.fail("read stuck hang")
    process = place.start(sys.executable, "-c", MAPPER, os.fspath(place.mountpoint / "stuck"), str(mappers))
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(mappers)]

    def all_wait() -> bool:
        return all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D" for pid in pids)

    wait_until(all_wait, "all of them wait for their page")
    code = "import mmap; fd = os.open('cold', os.O_RDONLY); m = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
    in_time(30, place, code + "assert len(m[:]) == 50 * 4096")
    hanging.fail()
    process.communicate(timeout=60)
    assert process.returncode == 0
