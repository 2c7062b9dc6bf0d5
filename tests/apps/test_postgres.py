"""PostgreSQL on a mount: initdb, pgbench, a crash, and every page checked in the backing."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.apps.programs import Options
from tests.conftest import Place, wait_until
from tests.mounted import Mounted

SECONDS = 60.0
PROGRAMS = ("initdb", "postgres", "pgbench", "psql", "pg_checksums")


def directory_of_programs() -> Path | None:
    """Return the newest complete PostgreSQL installation."""
    found = [
        path
        for path in Path("/usr/lib/postgresql").glob("*/bin")
        if all(os.access(path / program, os.X_OK) for program in PROGRAMS)
    ]
    return max(found, key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0, default=None)


def unprivileged_user() -> pwd.struct_passwd | None:
    """Return a user other than root, which PostgreSQL requires."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


BIN = directory_of_programs()
USER = unprivileged_user()

pytestmark = [
    pytest.mark.mount,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(BIN is None, reason=f"missing: PostgreSQL ({', '.join(PROGRAMS)})"),
    pytest.mark.skipif(USER is None, reason="missing: a user postgres or nobody"),
]

CONFIGURATION = """
listen_addresses = ''
unix_socket_directories = '{socket}'
fsync = on
shared_buffers = 1MB
max_connections = 10
max_wal_size = 8MB
min_wal_size = 2MB
checkpoint_timeout = 30s
autovacuum_naptime = 1s
"""
SUMS = """
select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches),
       (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)
"""


class Postgres:
    """A server that runs as a user other than root."""

    def __init__(self, data: Path, socket: Path) -> None:
        self.data = data
        self.socket = socket
        self.process: subprocess.Popen[str] | None = None
        self._log = socket / "log"

    def run(self, program: str, *words: str | Path) -> str:
        """Run a program of PostgreSQL."""
        process = self._popen(subprocess.PIPE, program, *words)
        try:
            printed, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        assert process.returncode == 0, f"{printed}{errors}{self.log()}"
        return printed

    def sql(self, statement: str) -> str:
        """Run a query; return its result."""
        return self.run("psql", "-X", "-A", "-t", "-h", self.socket, "-d", "postgres", "-c", statement).strip()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with self._log.open("a") as log:
            self.process = self._popen(log, "postgres", "-D", self.data)
        wait_until(self._answers, "the server answers", SECONDS)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(AssertionError):
            return self.sql("select 1") == "1"
        return False

    def stop(self, how: signal.Signals) -> int:
        """Stop the server: SIGINT shuts it down, SIGQUIT is a crash that it recovers from."""
        process, self.process = self.process, None
        assert process is not None
        try:
            process.send_signal(how)
            return process.wait(timeout=SECONDS)
        finally:
            process.kill()  # its children end after it
            process.wait(timeout=SECONDS)

    def log(self) -> str:
        """Return the end of its log."""
        return self._log.read_text()[-4000:] if self._log.exists() else ""

    def _popen(self, output: int | IO[str], program: str, *words: str | Path) -> subprocess.Popen[str]:
        assert BIN is not None
        assert USER is not None
        return subprocess.Popen(
            [BIN / program, *words],
            user=USER.pw_uid,
            group=USER.pw_gid,
            extra_groups=[],
            cwd=self.socket,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "PGUSER": "tester", "HOME": os.fspath(self.socket)},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


@pytest.fixture
def postgres(open_place: Place, mounted: Mounted) -> Iterator[Postgres]:
    """Yield a server with its directories."""
    assert USER is not None
    socket = open_place.source.parent / "socket"
    for directory in (socket, mounted.source / "data"):
        directory.mkdir(mode=0o700)
        os.chown(directory, USER.pw_uid, USER.pw_gid)
    made = Postgres(mounted.root / "data", socket)
    try:
        yield made
    finally:
        if made.process is not None:
            made.stop(signal.SIGQUIT)


def test_pgbench_adds_up_and_every_page_is_sound(mounted: Mounted, writing: Options, postgres: Postgres) -> None:
    mounted.start(*writing, "-o", "allow_other")
    where = ("-h", postgres.socket)
    postgres.run("initdb", "-k", "-A", "trust", "-U", "tester", "-N", "--wal-segsize=1", "-D", postgres.data)
    with (postgres.data / "postgresql.conf").open("a") as file:
        file.write(CONFIGURATION.format(socket=postgres.socket))
    postgres.start()
    postgres.run("pgbench", "-i", "-q", "-s", "1", *where, "postgres")
    done = 0
    for how, seconds in ((signal.SIGQUIT, "3"), (signal.SIGINT, "1")):
        report = postgres.run("pgbench", "-n", "-T", seconds, "-c", "2", *where, "postgres")
        found = re.search(r"transactions actually processed: (\d+)", report)
        assert found is not None, report
        done += int(found[1])
        sums = postgres.sql(SUMS)
        assert len(set(sums.split("|"))) == 1, sums
        stopped = postgres.stop(how)
        assert stopped == 0 or how == signal.SIGQUIT, postgres.log()
        postgres.start()
        assert postgres.sql(SUMS) == sums, "after a crash or a shutdown"
        assert postgres.sql("select count(*) from pgbench_history") == str(done)
        assert postgres.sql("select count(*), count(distinct aid) from pgbench_accounts") == "100000|100000"
    assert done > 0
    assert BIN is not None
    if (BIN / "pg_amcheck").exists() and postgres.sql("select 1 from pg_available_extensions where name = 'amcheck'"):
        postgres.run("pg_amcheck", "--install-missing", "--heapallindexed", "-t", "public.*", *where, "postgres")
    assert postgres.stop(signal.SIGINT) == 0, postgres.log()
    assert mounted.stats()["cache_evictions"] > 1000
    mounted.end()
    checked = postgres.run("pg_checksums", "--check", "-D", mounted.source / "data")
    assert re.search(r"Bad checksums: +0\b", checked), checked
