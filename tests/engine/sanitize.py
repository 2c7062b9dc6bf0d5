"""Build the C tests with the engine's sources under sanitizers, and run them.

    python -m tests.engine.sanitize [--seconds 60] [--seed N]

Assertions are on, so `tmem_check` checks. A report of a sanitizer ends a program with an error.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = sorted(path.stem for path in (ROOT / "tests/engine").glob("*_test.c"))
SANITIZERS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
FLAGS = shlex.split(
    "-std=c11 -O1 -g -fno-omit-frame-pointer -D_GNU_SOURCE -DTMEM_DEBUG -pthread -Wall -Wextra -Wconversion -Werror"
)
LIBRARIES = ["-llz4", "-lxxhash", "-lm"]
_BUILD_SECONDS = 300
_PATIENCE = 120  # seconds beyond what a program was given: TSan is slow, and the last check is long


class Failure(Exception):
    """A test or its build failed; the message is its output."""


def missing(sanitizer: str, folder: Path) -> str | None:
    """Return why programs cannot run under a sanitizer here, None if they can."""
    program = folder / f"probe-{sanitizer}"
    command = [*_compiler(), *SANITIZERS[sanitizer], "-x", "c", "-", "-o", str(program)]
    try:
        built = subprocess.run(
            command, input="int main(void) { return 0; }\n", capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        return "there is no C compiler"
    if built.returncode:
        return f"{sanitizer} is missing: {built.stderr.strip().splitlines()[-1]}"
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    return f"{sanitizer} does not run here: {ran.stderr.strip()[:200]}" if ran.returncode else None


def build(sanitizer: str, folder: Path) -> dict[str, Path]:
    """Build all tests under a sanitizer into a folder; return the programs by name."""
    sources = [*sorted((ROOT / "backend/engine").glob("*.c")), *(ROOT / f"tests/engine/{test}.c" for test in TESTS)]
    include = ["-I", str(ROOT / "backend/engine"), "-I", str(ROOT / "tests/engine")]
    objects = {source.stem: folder / f"{source.stem}-{sanitizer}.o" for source in sources}

    def compile_one(source: Path) -> None:
        _run([*_compiler(), *FLAGS, *SANITIZERS[sanitizer], *include, "-c", source, "-o", objects[source.stem]])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    engine = [path for name, path in objects.items() if name not in TESTS]
    programs = {test: folder / f"{test}-{sanitizer}" for test in TESTS}
    for test, program in programs.items():
        _run([*_compiler(), "-pthread", *SANITIZERS[sanitizer], objects[test], *engine, *LIBRARIES, "-o", program])
    return programs


def run(program: Path, seconds: float, seed: int) -> None:
    """Run a test for some seconds; raise Failure with what it printed if it fails."""
    _run([program, str(seconds), str(seed)], seconds + _PATIENCE)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or "cc")


def _run(command: list[str | Path], seconds: float = _BUILD_SECONDS) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failure(f"{shlex.join(map(str, command))} did not end") from None
    if done.returncode:
        raise Failure(f"{shlex.join(map(str, command))} returned {done.returncode}:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Run every test under every sanitizer; exit with an error when one fails."""
    parser = argparse.ArgumentParser(description="Run the C tests of the engine under sanitizers.")
    parser.add_argument("--seconds", type=float, default=60, help="of each test under each sanitizer")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    asked = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sanitizer in SANITIZERS:
            if reason := missing(sanitizer, folder):
                print(f"{sanitizer}: skipped: {reason}")
                continue
            try:
                for test, program in build(sanitizer, folder).items():
                    run(program, asked.seconds, asked.seed)
                    print(f"{sanitizer}: {test}: {asked.seconds:g} s without a report, seed {asked.seed}", flush=True)
            except Failure as failure:
                failed = True
                print(f"{sanitizer}: {failure}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
