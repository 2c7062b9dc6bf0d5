"""Pictures have values with their sign at the end of each bar, and intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.tools import draw
from bench.tools.verdict import Spread, spread

pytest.importorskip("matplotlib")

GROUPS: Mapping[str, Mapping[str, float | Spread]] = {
    "scan": {"5 ms": spread([-12.0, -9.0, -6.1, -5.0, -3.0, -2.0]), "0.5 ms": 2.9},
    "fits": {"5 ms": spread([-30.0, -11.4, 38.0])},
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the axes of a drawing."""
    made: list[Any] = []
    save = draw._save

    def kept(figure: Any, path: Path) -> None:
        made.append(figure.axes[0])
        save(figure, path)

    monkeypatch.setattr(draw, "_save", kept)
    return made


def labels(axes: Any) -> dict[str, Any]:
    return {text.get_text(): text for text in axes.texts}


def test_a_label_carries_its_sign_and_stands_at_the_end_of_its_bar(drawn: list[Any], tmp_path: Path) -> None:
    draw.bars(tmp_path / "a.png", "title", GROUPS, "% more", form="{:+.1f} %")
    found = labels(drawn[0])
    assert found.keys() == {"−5.5 %", "+2.9 %", "−11.4 %"}
    negative, positive = found["−5.5 %"], found["+2.9 %"]
    assert (negative.get_ha(), negative.xy[0]) == ("right", -12.0), "left of the bar and its interval"
    assert (positive.get_ha(), positive.xy[0]) == ("left", 2.9)
    draw.bars(tmp_path / "b.png", "title", {"a": {"x": -1234.0}}, "unit")
    assert labels(drawn[1]).keys() == {"−1,234"}


def test_intervals_are_lines_and_the_legend_says_what_they_are(drawn: list[Any], tmp_path: Path) -> None:
    draw.bars(tmp_path / "a.png", "title", GROUPS, "unit")
    lines = [tuple(line.get_xdata()) for line in drawn[0].lines]
    assert (-12.0, -2.0) in lines
    assert (-30.0, 38.0) in lines
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()].count(draw.INTERVAL) == 1
