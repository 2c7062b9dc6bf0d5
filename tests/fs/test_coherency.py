"""Close-to-open: changes of the backing by others are seen at the next open, own changes at once."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.mounted import Mounted, shell
from tests.pagebytes import page_of, pages_of
from tests.scheduling import wait_for_new_timestamp

pytestmark = pytest.mark.mount
Options = tuple[str, ...]


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite", "replace", "touch"])
def test_a_change_of_the_backing_is_seen_at_the_next_open(mounted: Mounted, variant: Options, change: str) -> None:
    path = mounted.source / "f"
    path.write_bytes(pages_of(1, 100))
    root = mounted.start(*variant)
    for number in range(3):
        assert (root / "f").read_bytes() == path.read_bytes()
        wait_for_new_timestamp()
        if change == "grow":
            with path.open("ab") as others:
                others.write(page_of(number, 12_345))
        elif change == "shrink":
            os.truncate(path, 300_000 - number * 10_001)
        elif change == "rewrite":
            with path.open("r+b") as others:
                others.seek(200_000)
                others.write(page_of(number + 5))
        elif change == "replace":
            (mounted.source / "new").write_bytes(pages_of(number + 5, 90 + number))
            os.replace(mounted.source / "new", path)
        else:
            os.utime(path, (number, number))
        with (root / "f").open("rb") as file:
            assert os.fstat(file.fileno()).st_size == path.stat().st_size
            assert os.fstat(file.fileno()).st_mtime_ns == path.stat().st_mtime_ns
            assert file.seek(0, os.SEEK_END) == path.stat().st_size
            file.seek(0)
            assert file.read() == path.read_bytes()


def test_a_mapping_shows_what_others_changed_before_the_open(mounted: Mounted) -> None:
    path = mounted.source / "f"
    root = mounted.start()
    for number in range(4):
        path.write_bytes(pages_of(number, 20 + number))
        with (root / "f").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            assert view[:] == pages_of(number, 20 + number)


def test_attributes_and_names_are_answered_from_memory_for_the_timeout(mounted: Mounted) -> None:
    (mounted.source / "f").write_text("x")
    root = mounted.start("--attr-timeout", "1m", "--negative-timeout", "1m")
    os.stat(root / "f")
    assert not (root / "missing").exists()
    before = mounted.stats()["backing_calls"]
    for _ in range(50):
        os.stat(root / "f")
        assert not (root / "missing").exists()
    assert mounted.stats()["backing_calls"] <= before + 2
    (root / "missing").write_text("made here")
    assert (root / "missing").read_text() == "made here", "own changes are seen at once"


def test_reads_of_a_file_that_changes_size_return_only_bytes_it_had(mounted: Mounted, variant: Options) -> None:
    """Another process truncates and extends the backing file; every byte is a stamp of its position, or zero."""
    path = mounted.source / "f"
    unit = b"".join(number.to_bytes(8, "little") for number in range(100_000))
    path.write_bytes(unit)
    root = mounted.start(*variant)
    stop = threading.Event()

    def others() -> None:
        generator = random.Random(3)
        while not stop.is_set():
            size = generator.randrange(len(unit) // 8) * 8
            os.truncate(path, size)
            with path.open("r+b") as file:
                file.seek(size)
                file.write(unit[size : size + generator.randrange(200_000) // 8 * 8])

    thread = threading.Thread(target=others)
    thread.start()
    try:
        generator = random.Random(4)
        for _ in range(150):
            with (root / "f").open("rb", buffering=0) as reader:
                offset = generator.randrange(90_000) * 8
                data = os.pread(reader.fileno(), generator.choice([4096, 100_000]), offset)
                there = unit[offset : offset + len(data)]
                assert all(byte in (wanted, 0) for byte, wanted in zip(data, there, strict=True))
    finally:
        stop.set()
        thread.join(30)
    path.write_bytes(unit)
    assert (root / "f").read_bytes() == unit


# -- two processes, and mappings -------------------------------------------------------------------------------------

PARTNER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for line in sys.stdin:
    offset, size, seed = map(int, line.split())
    if seed < 0:
        data = os.pread(fd, size, offset)
        print(data.hex(), flush=True)
    else:
        os.pwrite(fd, bytes([seed]) * size, offset)
        print("done", flush=True)
"""


def test_two_processes_on_one_file_see_each_other_at_once(mounted: Mounted, variant: Options) -> None:
    root = mounted.start(*variant)
    size = 2_000_000
    (root / "f").write_bytes(bytes(size))
    partner = subprocess.Popen(
        [sys.executable, "-c", PARTNER, root / "f"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert partner.stdin is not None
    assert partner.stdout is not None
    model, generator = bytearray(size), random.Random(9)
    try:
        fd = os.open(root / "f", os.O_RDWR)
        for step in range(300):
            offset, count = generator.randrange(size - 20_000), generator.randrange(1, 20_000)
            seed = generator.randrange(256)
            action = generator.randrange(4)
            if action == 0:
                os.pwrite(fd, bytes([seed]) * count, offset)
                model[offset : offset + count] = bytes([seed]) * count
            elif action == 1:
                assert os.pread(fd, count, offset) == model[offset : offset + count], step
            else:
                partner.stdin.write(f"{offset} {count} {seed if action == 2 else -1}\n")
                partner.stdin.flush()
                answer = partner.stdout.readline().strip()
                if action == 2:
                    assert answer == "done"
                    model[offset : offset + count] = bytes([seed]) * count
                else:
                    assert bytes.fromhex(answer) == model[offset : offset + count], step
        os.close(fd)
    finally:
        partner.kill()
        partner.communicate(timeout=30)
    assert (root / "f").read_bytes() == model == (mounted.source / "f").read_bytes()


def test_processes_that_lock_a_counter_lose_no_increment(mounted: Mounted, writing: Options, tmp_path: Path) -> None:
    root = mounted.start(*writing)
    (root / "counter").write_text("0")
    program = tmp_path / "count.py"
    program.write_text(
        "import fcntl\n"
        "for _ in range(50):\n"
        "    with open('counter', 'r+') as f:\n"
        "        fcntl.lockf(f, fcntl.LOCK_EX)\n"
        "        n = int(f.read())\n"
        "        f.seek(0); f.write(str(n + 1)); f.flush()\n"
    )
    shell('for i in 1 2 3 4; do python3 "$P" & done; for j in $(jobs -p); do wait $j; done', root, P=program)
    assert (root / "counter").read_text() == "200"


def test_shared_mappings_and_read_and_write_agree(mounted: Mounted, variant: Options) -> None:
    root = mounted.start(*variant)
    if "shared mmap on" not in mounted.log():
        pytest.skip("missing: shared mmap on direct I/O (Linux 6.6)")
    size = 512 * 4096
    (root / "f").write_bytes(bytes(size))
    model, generator = bytearray(size), random.Random(11)
    fd = os.open(root / "f", os.O_RDWR)
    with mmap.mmap(fd, size) as view:
        for step in range(300):
            offset, count = generator.randrange(size - 9000), generator.randrange(1, 9000)
            data = bytes([generator.randrange(256)]) * count
            match generator.randrange(6):
                case 0:
                    os.pwrite(fd, data, offset)
                    model[offset : offset + count] = data
                case 1 | 2:
                    view[offset : offset + count] = data
                    model[offset : offset + count] = data
                case 3:
                    assert view[offset : offset + count] == model[offset : offset + count], step
                case 4:
                    assert os.pread(fd, count, offset) == model[offset : offset + count], step
                case _:
                    view.flush()
        assert view[:] == model
        view.flush()
    os.close(fd)
    assert (root / "f").read_bytes() == model
    mounted.end()
    assert (mounted.source / "f").read_bytes() == model
