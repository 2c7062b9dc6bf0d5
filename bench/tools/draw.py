"""Draw bars and lines. The same arm has the same colour in every picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tools.verdict import Spread

COLOURS = {
    "ours": "#1f5fa8",
    "LRU": "#c9702c",
    "FIFO": "#e0b04a",
    "S3-FIFO": "#7b4ea3",
    "Belady": "#3a3a3a",
    "a static": "#8c8c8c",
    "b balloon": "#c9702c",
    "b quick balloon": "#e0b04a",
    "c greedy": "#8ab4e0",
    "d policy": "#3f8fc9",
    "e shipped": "#1f5fa8",
    "f limit": "#3a3a3a",
    "5 ms": "#1f5fa8",
    "0.5 ms": "#8ab4e0",
    "unthrottled": "#b0b0b0",
}
_SPARE = ("#1f5fa8", "#c9702c", "#7b4ea3", "#e0b04a", "#4f8f4f", "#b5473c", "#8c8c8c", "#3a3a3a")
_DPI = 110
INTERVAL = "95-% interval\n(range, of fewer than six)"


def colour(name: str, number: int = 0) -> str:
    """Return the colour of an arm; by its number if it has none."""
    return COLOURS.get(name, _SPARE[number % len(_SPARE)])


def bars(
    path: Path,
    title: str,
    groups: Mapping[str, Mapping[str, float | Spread]],
    unit: str,
    *,
    goal: float | None = None,
    form: str = "",
) -> None:
    """Draw horizontal bars of one unit: a group for each key, with a bar and its value for each arm.

    A Spread is drawn as its median, with a line from end to end of its interval.
    """
    arms = list(dict.fromkeys(arm for group in groups.values() for arm in group))
    height = sum(len(group) for group in groups.values()) * 0.27 + len(groups) * 0.35 + 1.3
    figure, axes = _axes(title, (9.0, max(2.4, height)))
    place, ticks = 0.0, []
    shown: set[str] = set()
    for group, values in groups.items():
        began = place
        for arm, given in values.items():
            label = "_" if arm in shown else arm
            shown.add(arm)
            value, low, high = _ends(given)
            axes.barh(place, value, height=0.85, color=colour(arm, arms.index(arm)), label=label)
            if low < high:
                label = "_" if INTERVAL in shown else INTERVAL
                shown.add(INTERVAL)
                axes.plot(
                    (low, high), (place, place), color="#3a3a3a", linewidth=1.2, marker="|", markersize=6, label=label
                )
            beyond = value < 0
            axes.annotate(
                (form.format(value) if form else _short(value)).replace("-", "−"),
                (min(value, low) if beyond else max(value, high), place),
                xytext=(-6 if beyond else 6, 0),
                textcoords="offset points",
                ha="right" if beyond else "left",
                va="center",
                fontsize=8,
            )
            place += 1
        ticks.append(((began + place - 1) / 2, group))
        place += 1.0
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(place - 0.7, -0.8)
    axes.set_xlabel(unit)
    axes.margins(x=0.2)
    axes.axvline(0, color="#3a3a3a", linewidth=0.8)
    if goal is not None:
        axes.axvline(goal, color="#b5473c", linestyle="--", linewidth=1.2, label=f"goal: {goal:g}")
    axes.grid(axis="x", alpha=0.3)
    if len(shown) > 1 or goal is not None:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(figure, path)


def _ends(given: float | Spread) -> tuple[float, float, float]:
    """Return a value and the ends of its interval; the value itself if there is none."""
    return (given.median, given.low, given.high) if isinstance(given, Spread) else (given, given, given)


def _short(value: float) -> str:
    """Write a number with about three digits, and no powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def panels(
    path: Path,
    title: str,
    parts: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    labels: tuple[str, str],
    columns: int = 4,
) -> None:
    """Draw a small picture of lines for each part, all with the same arms."""
    rows = -(-len(parts) // columns)
    figure, grid = _plots(title, rows, columns, (3.0 * columns, 2.5 * rows + 0.8))
    places = [axes for row in grid for axes in row]
    for axes, (name, series) in zip(places, parts.items(), strict=False):
        for number, (arm, points) in enumerate(series.items()):
            ordered = sorted(points)
            axes.plot(*zip(*ordered, strict=True), marker="o", markersize=3, color=colour(arm, number), label=arm)
        axes.set_title(name, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    for axes in places[len(parts) :]:
        axes.set_visible(False)
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    handles, names = places[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=10)
    _save(figure, path)


def _axes(title: str, size: tuple[float, float]) -> tuple[Any, Any]:
    figure, grid = _plots("", 1, 1, size)
    grid[0][0].set_title(title, loc="left", fontsize=11, fontweight="bold", wrap=True)
    return figure, grid[0][0]


def _plots(title: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # Imported here: it takes half a second, and most runs draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, horizontalalignment="left")
    for row in grid:
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
