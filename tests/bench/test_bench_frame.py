"""`python -m bench`: skipped measures say why, an interrupted run leaves its page, and the page shows all results."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cost, page
from bench.catalogue import CATALOGUE, missing
from bench.tools.children import environment, run
from bench.tools.content import MIB
from tests.bench.interrupting import interrupt

BENCH = [sys.executable, "-m", "bench"]


def result(directory: Path, name: str, **content: object) -> None:
    """Write a result as a measure does."""
    (directory / f"{name}.json").write_text(json.dumps(content))


def test_every_catalogued_measure_has_a_description_and_a_command() -> None:
    assert len({measure.name for measure in CATALOGUE}) == len(CATALOGUE)
    for measure in CATALOGUE:
        text = (Path(page.__file__).parent / f"{measure.name}.py").read_text()
        assert f"    python -m bench.{measure.name}" in text, measure.name


def test_traces_that_are_not_there_are_a_reason(tmp_path: Path) -> None:
    assert "TRACES=DIR" in missing(("traces",), None)
    assert "no directory" in missing(("traces",), tmp_path / "missing")
    assert missing(("traces",), tmp_path) == ""


def test_the_page_shows_met_missed_and_not_run_goals(tmp_path: Path) -> None:
    goals = [
        {"what": "reads <fast>", "goal": "≥ 2×", "result": "3×", "verdict": "met"},
        {"what": "writes", "goal": "≥ 2×", "result": "1×", "verdict": "missed"},
        {"what": "lists", "goal": "–", "result": "2×", "verdict": "reported"},
    ]
    result(
        tmp_path,
        "hits",
        goals=goals,
        figures={"notes": ["a note"]},
        command="python -m bench.hits",
        seconds=1,
        processor_seconds=0.5,
        load_before=0.5,
    )
    result(tmp_path, "policies", skipped="no traces", command="python -m bench.policies")
    (tmp_path / "hits.png").write_bytes(b"picture")
    (tmp_path / page.RUN).write_text(json.dumps({"command": "make bench", "machine": {"memory_bytes": 1 << 30}}))
    text = page.build(tmp_path).read_text()
    assert "reads &lt;fast&gt;" in text
    assert text.count("<td class=met>met") == text.count("<td class=missed>missed") == 2, (
        "in the table of all and in its section"
    )
    assert "python -m bench.hits" in text
    assert "a note" in text
    assert "data:image/png;base64" in text
    assert "Skipped: no traces" in text
    assert "1.0 GiB" in text
    assert text.count("lists") == 1, "what has no goal is in its section alone"
    assert "1 met, 1 missed." in text
    assert text.count("Not run.") == len(CATALOGUE) - 2


def test_a_measure_that_cannot_run_is_skipped_with_its_reason(tmp_path: Path) -> None:
    output = run([*BENCH, "--only", "policies", "--out", tmp_path], seconds=60).decode()
    assert "skipped: no traces were given" in output
    assert "no traces were given" in json.loads((tmp_path / "policies.json").read_text())["skipped"]
    assert "no traces were given" in (tmp_path / "index.html").read_text()


def test_a_measure_that_does_not_exist_is_one_clear_line(tmp_path: Path) -> None:
    command = [*BENCH, "--only", "nothing", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"bench: no measure is called nothing: there are claim, ")


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_its_page_and_no_mount(tmp_path: Path, number: signal.Signals) -> None:
    out, space = tmp_path / "out", tmp_path / "space"
    space.mkdir()
    command = [*BENCH, "--only", "policies", "poolhit", "--out", str(out)]
    interrupt(command, space, number)
    text = (out / "index.html").read_text()
    assert "interrupted" in text
    assert "no traces were given" in text, "what ended before is there"


@pytest.mark.mount
def test_the_cost_is_reported_for_every_backing(tmp_path: Path) -> None:
    load = "scan, 128-KiB reads"
    outcome = cost.measure(pairs=2, cache=2 * MIB, times=2, only=[load])
    assert set(outcome.figures["loads"]) == {load}
    for found in outcome.figures["loads"][load].values():
        assert len(found["slower_percent"]) == len(found["busier_percent"]) == len(found["counted"]) == 2
        for counted in found["counted"]:
            assert counted["backing_pages"] >= 2 * 2 * MIB // 4096
    assert [goal.verdict for goal in outcome.goals] == ["not decided", "not decided", "reported"], "two pairs are few"
    cost.picture(outcome.figures, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").exists()
