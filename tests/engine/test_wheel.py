"""What packagers do: the source archive has all that the engine is built from, and its wheel can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKEND = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"
USE = "import tmem._engine as engine; print(engine.lib.TMEM_PAGE, engine.__file__)"


def ran(*command: str | Path, **variables: str) -> str:
    """Run a command without the flags of developers; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TMEM_CFLAGS", "PYTHONPATH")}
    done = subprocess.run(command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words: str | Path, python: Path | None = None) -> None:
    options: list[str | Path] = ["--python", python] if python else []
    ran(sys.executable, "-m", "pip", "--disable-pip-version-check", *options, *words)


def test_a_wheel_of_the_source_archive_works_in_a_clean_environment(tmp_path: Path) -> None:
    archive = tmp_path / ran(sys.executable, "-c", BACKEND, tmp_path).splitlines()[-1]
    pip("wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", tmp_path, archive)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-abi3-" in wheel.name
    ran(sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean")
    python = tmp_path / "clean/bin/python"
    pip("install", "--no-index", "--no-deps", wheel, python=python)
    # cffi comes from where the tests run; an editable installation there is not seen through PYTHONPATH.
    said = ran(python, "-c", USE, PYTHONPATH=sysconfig.get_path("purelib"))
    assert said.startswith(f"4096 {tmp_path}")


def test_a_missing_header_is_named_with_the_remedy() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "CC": "gcc -nostdinc"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("apt install liblz4-dev libxxhash-dev")
