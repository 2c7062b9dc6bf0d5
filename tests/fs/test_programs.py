"""Ordinary programs read and write the same on a mount as on the backing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mounted import Mounted, needs, shell

pytestmark = pytest.mark.mount
Options = tuple[str, ...]


CHECKSUMS = "find . -type f -print0 | sort -z | xargs -0 sha256sum"
NODES = "find . -printf '%P %y %m %n %U %G %T@ %l ' -type f -printf '%s' -o -printf '\\n' | sort"


def test_every_way_of_reading_returns_the_bytes_of_the_backing(mounted: Mounted, tree: Path, variant: Options) -> None:
    root = mounted.start(*variant)
    for _ in range(2):
        assert shell(CHECKSUMS, root) == shell(CHECKSUMS, tree)
        assert shell(NODES, root) == shell(NODES, tree)
        archive = "tar --sort=name -cf - . | sha256sum"
        assert shell(archive, root) == shell(archive, tree)
        search = "grep -rn 'def .*self' . | sort | sha256sum"
        assert shell(search, root) == shell(search, tree)
        shell('diff -r --no-dereference . "$OTHER"', root, OTHER=tree)
    stats = mounted.stats()
    assert stats["precache_succ_gets"] + stats["precache_reads"] > 0
    assert stats["cache_evictions"] > 1000
    assert stats["cache_resident_bytes"] <= stats["cache_capacity_bytes"] == 1 << 20


def test_reads_without_a_pool_return_the_bytes_of_the_backing(mounted: Mounted, tree: Path) -> None:
    root = mounted.start("--pool", "none")
    for _ in range(2):
        assert shell(CHECKSUMS, root) == shell(CHECKSUMS, tree)


def test_copies_into_the_mount_are_whole(mounted: Mounted, tree: Path, variant: Options, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shell('cp -a . "$TO"', tree, TO=outside)
    root = mounted.start(*variant)
    shell(
        """
        mkdir a b c
        cp -a "$FROM/." a
        tar -C "$FROM" --format=pax -cf - . | tar -C b -xpf -
        cp -a a c/d
        diff -r --no-dereference "$FROM" a
        diff -r --no-dereference a b
        diff -r --no-dereference a c/d
        """,
        root,
        FROM=outside,
    )
    for name in ("a", "b", "c/d"):
        assert shell(NODES, root / name) == shell(NODES, outside)
        assert shell(CHECKSUMS, root / name) == shell(CHECKSUMS, outside)
    shell("rm -rf a c", root)
    mounted.end()
    assert shell(CHECKSUMS, mounted.source / "b") == shell(CHECKSUMS, outside)
    assert shell(NODES, mounted.source / "b") == shell(NODES, outside)
    assert not (mounted.source / "a").exists()


@needs("git")
def test_git_works_and_fsck_finds_no_error(mounted: Mounted, tree: Path, variant: Options) -> None:
    root = mounted.start(*variant)
    shell(
        """
        git init -q -b main .
        git add -A .
        git commit -q -m one
        for i in 1 2; do echo $i >> json/decoder.py; git commit -q -a -m "change $i"; done
        git checkout -q -b side HEAD~1 && git mv json jason && git commit -q -m renamed
        git checkout -q main && git merge -q --no-edit side
        git gc -q
        git fsck --full --strict
        test -z "$(git status --porcelain)"
        git clone -q . inner/clone
        git -C inner/clone fsck --full
        rm -rf inner
        """,
        root,
    )
    mounted.end()
    shell("git fsck --full --strict; git status --porcelain > ../status; test ! -s ../status", mounted.source)


@needs("gcc", "make")
def test_a_c_program_builds_and_runs_on_the_mount(mounted: Mounted, variant: Options) -> None:
    units = 6
    for unit in range(units):
        functions = "\n".join(f"int f{unit}_{n}(int x) {{ return x * {n} + {unit}; }}" for n in range(120))
        (mounted.source / f"u{unit}.c").write_text(f'#include "all.h"\n{functions}\n')
    (mounted.source / "all.h").write_text("".join(f"int f{unit}_7(int);\n" for unit in range(units)))
    calls = " + ".join(f"f{unit}_7(1)" for unit in range(units))
    (mounted.source / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    (mounted.source / "Makefile").write_text(
        "OBJ := $(patsubst %.c,%.o,$(wildcard *.c))\n"
        "prog: $(OBJ)\n\tgcc -o $@ $^\n"
        "%.o: %.c all.h\n\tgcc -g -O0 -c -o $@ $<\n"
    )
    root = mounted.start(*variant)
    shell("make -j4", root)
    assert shell("./prog", root) == f"{sum(7 + unit for unit in range(units))}\n"
    assert "up to date" in shell("make", root), "times are kept"
    shell("touch all.h && make -j2 && make -q", root)


SQL = """
import random, sqlite3, sys
base = sqlite3.connect("data.db", timeout=120)
mode = base.execute(f"pragma journal_mode={sys.argv[1]}").fetchone()[0]
assert mode == sys.argv[1], mode
base.execute("create table if not exists t (k integer primary key, v blob)")
generator = random.Random(int(sys.argv[2]))
for _ in range(10):
    with base:
        for _ in range(20):
            base.execute("insert or replace into t values (?, ?)",
                (generator.randrange(2000), generator.randbytes(generator.randrange(2000))))
        base.execute("delete from t where k = ?", (generator.randrange(2000),))
print(base.execute("select count(*), sum(length(v)) from t").fetchone())
"""


@needs("sqlite3")
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite_keeps_its_database_sound(mounted: Mounted, writing: Options, journal: str, tmp_path: Path) -> None:
    root = mounted.start(*writing)
    program = tmp_path / "sql.py"
    program.write_text(SQL)
    shell(f'python3 "$P" {journal} 1; python3 "$P" {journal} 2', root, P=program)
    shell(f'python3 "$P" {journal} 3 & python3 "$P" {journal} 4; wait $!', root, P=program)
    assert shell("sqlite3 data.db 'pragma integrity_check'", root) == "ok\n"
    rows = shell("sqlite3 data.db 'select count(*), sum(length(v)) from t'", root)
    mounted.end()
    assert shell("sqlite3 data.db 'pragma integrity_check'", mounted.source) == "ok\n"
    assert shell("sqlite3 data.db 'select count(*), sum(length(v)) from t'", mounted.source) == rows


@needs("fio")
@pytest.mark.parametrize("pattern", ["randwrite", "write", "randrw"])
def test_fio_finds_every_block_as_it_was_written(mounted: Mounted, variant: Options, pattern: str) -> None:
    root = mounted.start(*variant)
    shell(
        f"fio --name=v --filename=v --rw={pattern} --bsrange=1k-64k --size=6M --ioengine=psync --randseed=7 "
        f"--verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64 --output-format=terse > ../fio.out",
        root,
    )
    assert mounted.stats()["cache_evictions"] > 0


@needs("fio")
def test_fio_verifies_through_shared_mappings(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    shell(
        "fio --name=m --filename=m --rw=randwrite --bs=4k --size=4M --ioengine=mmap --randseed=7 "
        "--verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=terse > ../fio.out",
        root,
    )
