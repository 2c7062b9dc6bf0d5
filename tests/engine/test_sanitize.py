"""The C tests of the engine under sanitizers, shortly. `make sanitize` runs them for longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engine.sanitize import SANITIZERS, TESTS, build, missing, run

SECONDS = float(os.environ.get("SANITIZE_SECONDS", "2"))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_c_tests_pass_without_a_report(sanitizer: str, tmp_path: Path) -> None:
    if reason := missing(sanitizer, tmp_path):
        pytest.skip(reason)
    programs = build(sanitizer, tmp_path)
    assert list(programs) == TESTS
    for program in programs.values():
        run(program, SECONDS, seed=1)
