"""A program that writes records through a mount and notes which writes were acknowledged.

    python recorder.py DIRECTORY NOTES SEED fsync|write

It waits for a line on its standard input, writes records until the first error, prints how many were acknowledged and
waits again. NOTES, outside of the mount, gets one line before each write (`?`) and one after the acknowledgement (`!`):
the write's own return, or that of the fsync after it. A record is in a slot of fixed size of one of a few files; its
bytes tell slot and number, and end in a checksum.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import zlib

FILES = 3
SLOTS = 100  # of each file: together larger than the cache and the pool
SLOT_BYTES = 9000  # so that records share pages


def record(file: int, slot: int, number: int) -> bytes:
    """Return a record's bytes."""
    head = f"file {file} slot {slot} number {number}\n".encode()
    body = head + random.Random(number).randbytes(SLOT_BYTES - 4 - len(head))
    return body + zlib.crc32(body).to_bytes(4, "little")


def number_of(data: bytes, file: int, slot: int) -> int | None:
    """Return the number of a slot's record; None if it is torn or of another slot."""
    words = data.partition(b"\n")[0].split()
    if len(data) != SLOT_BYTES or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:] or len(words) != 6:
        return None
    return int(words[5]) if (int(words[1]), int(words[3])) == (file, slot) else None


def write_until_error(directory: str, notes: int, source: random.Random, number: int, *, sync: bool) -> int:
    """Write records from a number on until the mount fails; return the last number tried."""
    fds: list[int] = []
    try:
        fds = [os.open(os.path.join(directory, f"f{file}"), os.O_RDWR | os.O_CREAT) for file in range(FILES)]
        while True:
            pending = []
            file = source.randrange(FILES)
            for _ in range(source.randint(1, 6) if sync else 1):
                number += 1
                slot = source.randrange(SLOTS)
                os.write(notes, f"? {file} {slot} {number}\n".encode())
                data = record(file, slot, number)
                if os.pwrite(fds[file], data, slot * SLOT_BYTES) != len(data):
                    return number
                pending.append((slot, number))
            if sync:
                os.fsync(fds[file])
            os.write(notes, "".join(f"! {file} {slot} {done}\n" for slot, done in pending).encode())
    except OSError:
        return number
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):  # the mount is gone
                os.close(fd)


def main(words: list[str]) -> None:
    """Serve one line of standard input after the other."""
    directory, notes_path, seed, how = words
    source, number = random.Random(int(seed)), 0
    notes = os.open(notes_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in sys.stdin:
        number = write_until_error(directory, notes, source, number, sync=how == "fsync")
        print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
