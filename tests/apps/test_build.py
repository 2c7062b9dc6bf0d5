"""make and a C compiler on a mount build the right programs, and rebuild exactly what changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.apps.programs import Options, snapshot
from tests.mounted import Mounted, needs, shell

pytestmark = [pytest.mark.mount, needs("gcc", "make")]
UNITS = 40
HEADERS = 8

MAKEFILE = """
OBJ := $(patsubst %.c,%.o,$(sort $(wildcard u*.c))) main.o
prog: lib.a
\tgcc -o $@ $^
lib.a: $(OBJ)
\trm -f $@ && ar rcsD $@ $^
%.o: %.c
\t@echo CC $<
\t@gcc -O0 -MMD -MP -c -o $@ $<
-include $(OBJ:.o=.d)
"""


def uses(unit: int) -> set[int]:
    """Return the headers that a unit includes."""
    return {unit % HEADERS, (unit * 3 + 1) % HEADERS}


def generate(top: Path) -> None:
    """Write the sources."""
    top.mkdir()
    for header in range(HEADERS):
        (top / f"h{header}.h").write_text(f"#pragma once\n#define VALUE{header} {header * 7 + 1}\n")
    for unit in range(UNITS):
        includes = "".join(f'#include "h{header}.h"\n' for header in sorted(uses(unit)))
        total = " + ".join(f"VALUE{header}" for header in sorted(uses(unit)))
        functions = "".join(f"int g{unit}_{n}(int x) {{ return x * {n} + {unit}; }}\n" for n in range(70))
        (top / f"u{unit}.c").write_text(f"{includes}{functions}int f{unit}(void) {{ return {total}; }}\n")
    declared = "".join(f"int f{unit}(void);\n" for unit in range(UNITS))
    calls = "".join(f'    printf("%d\\n", f{unit}());\n' for unit in range(UNITS))
    (top / "main.c").write_text(f"#include <stdio.h>\n{declared}int main(void) {{\n{calls}    return 0;\n}}\n")
    (top / "Makefile").write_text(MAKEFILE)


def compiled(top: Path) -> list[str]:
    """Run make, and return what it compiled."""
    return sorted(line[3:] for line in shell("make -j2", top).splitlines() if line.startswith("CC "))


def build(top: Path) -> list[object]:
    """Build, change, build again; return all results."""
    seen: list[object] = [compiled(top), shell("./prog", top)]
    assert "up to date" in shell("make", top), "times are kept"
    shell("touch h3.h", top)
    seen.append(compiled(top))
    assert "up to date" in shell("make", top)
    (top / "h5.h").write_text("#pragma once\n#define VALUE5 1000\n")
    seen += [compiled(top), shell("./prog", top)]
    # A header older than the object files causes no rebuild, even if it changed.
    os.utime(top / "h1.h", ns=(0, time.time_ns() - 10**12))
    seen.append(compiled(top))
    (top / "u7.o").unlink()
    seen.append(compiled(top))
    shell("make -q", top)
    return seen


def test_make_builds_and_rebuilds_the_dependents_only(mounted: Mounted, writing: Options, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    generate(plain)
    root = mounted.start(*writing)
    generate(root / "c")
    expected = build(plain)
    sources = [f"u{unit}.c" for unit in range(UNITS)]
    assert expected[0] == sorted([*sources, "main.c"])
    assert expected[2] == sorted(f"u{unit}.c" for unit in range(UNITS) if 3 in uses(unit))
    assert expected[5:] == [[], ["u7.c"]]
    assert build(root / "c") == expected
    assert mounted.stats()["cache_evictions"] > 0
    mounted.end()
    shell("make -q", mounted.source / "c")
    built = {name: node[-2] for name, node in snapshot(mounted.source / "c").items()}
    assert built == {name: node[-2] for name, node in snapshot(plain).items()}
