"""The swap benchmark runs and prints its figures."""

from __future__ import annotations

import json
import sys

import pytest

from tests.conftest import run

pytestmark = [pytest.mark.root, pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(900)]


def test_paging_is_measured_against_a_null_filesystem_and_zram(alone: None) -> None:
    done = run(sys.executable, "-m", "bench.swap", "--rounds", "1", "--slow-rounds", "0", seconds=800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["figures"]["hswap_times"]["null"]) == 6
    assert found["figures"]["passes"]["hswap"][0]["pswpout"] > 0
