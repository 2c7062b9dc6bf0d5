"""Insert numbered rows into a database, a transaction at a time, and note each whose COMMIT returned.

    sqlwriter.py DATABASE JOURNAL NOTES WRITER SEED

A note is a line, written at once: `? FIRST LAST` before a COMMIT, `! FIRST LAST` after it. Ends when stdin does.
"""

from __future__ import annotations

import os
import random
import select
import sqlite3
import sys
import time

TABLE = """
create table if not exists rows (
    writer integer, number integer, first integer, last integer, data blob, primary key (writer, number)
)
"""


def data_of(writer: int, number: int) -> bytes:
    """Return the content of a row: partly compressible, one page or several."""
    generator = random.Random(f"{writer} {number}")
    return generator.randbytes(generator.randrange(600)) * generator.randrange(1, 16)


def connect(path: str | os.PathLike[str], journal: str) -> sqlite3.Connection:
    """Open the database with a cache so small that a transaction spills before it commits."""
    base = sqlite3.connect(path, timeout=120, isolation_level=None)
    base.execute("pragma busy_timeout=120000")  # a busy machine with a busy disk is slow
    mode = base.execute(f"pragma journal_mode={journal}").fetchone()[0]
    assert mode == journal, mode
    base.execute("pragma synchronous=full")
    base.execute("pragma cache_size=10")
    base.execute("pragma wal_autocheckpoint=100")
    return base


def main() -> None:
    """Write until told to stop."""
    path, journal, notes_path, writer, seed = *sys.argv[1:4], int(sys.argv[4]), sys.argv[5]
    generator = random.Random(seed)
    notes = os.open(notes_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    base = connect(path, journal)
    while not select.select([0], [], [], 0)[0]:
        base.execute("begin immediate")
        first = base.execute("select coalesce(max(number), 0) + 1 from rows where writer = ?", (writer,)).fetchone()[0]
        last = first + generator.randrange(12)
        for number in range(first, last + 1):
            row = (writer, number, first, last, data_of(writer, number))
            base.execute("insert into rows values (?, ?, ?, ?, ?)", row)
        other, number = generator.randrange(3), generator.randrange(1, last + 1)
        for (data,) in base.execute("select data from rows where writer = ? and number = ?", (other, number)):
            assert data == data_of(other, number), f"row {number} of writer {other} is not as it was written"
        os.write(notes, b"? %d %d\n" % (first, last))
        base.execute("commit")
        os.write(notes, b"! %d %d\n" % (first, last))
        # sqlite's lock is not fair: a writer that takes it again at once starves the others, which sleep.
        time.sleep(generator.uniform(0, 0.03))
    base.close()


if __name__ == "__main__":
    main()
