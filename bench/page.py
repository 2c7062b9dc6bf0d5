"""Write index.html: what was measured, how, on which machine, and each result with its verdict."""

from __future__ import annotations

import base64
import html
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.catalogue import CATALOGUE, Measure
from bench.tools.verdict import Verdict

RESULTS = Path(__file__).parent / "results"
RUN = "run.json"  # about the run as a whole

_CLASSES: dict[str, str] = {Verdict.MET: "met", Verdict.MISSED: "missed", Verdict.OPEN: "undecided"}
_INTRODUCTION = (
    "<p>tmemfs puts a page cache, and behind it a pool of memory, before a slow directory; tmemd lends one pool "
    "to many mounts. Does that help, and what does it cost?</p>"
    "<p>Every comparison runs its sides in turn, in one run, on the same machine. Inputs are seeded. A figure that "
    "varies is a median, and behind it in brackets is the interval in which the true one is with 95 % confidence "
    "(of fewer than six, the lowest and the highest). A goal is <b>met</b> or <b>missed</b> when all of the "
    "interval is on one side of it, else <b>not decided</b>. The load before a measure is the machine's average of "
    "the last minute, other people's work included. The commands are run in the project's directory, with "
    "<code>.venv/bin/python</code>.</p>"
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.2rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #ddd; }
pre { background: #f4f4f2; padding: .6rem .8rem; overflow-x: auto; } img { max-width: 100%; }
.met { color: #1d6b2f; font-weight: bold; } .missed { color: #a8281c; font-weight: bold; }
.undecided { color: #8a5a00; font-weight: bold; } code { background: #f4f4f2; }
td:last-child { white-space: nowrap; }
.note { background: #fdf3dc; padding: .6rem .8rem; }
"""


def build(directory: Path) -> Path:
    """Write index.html from the results in a directory; name the measures that were not run."""
    run = _read(directory / RUN) or {}
    found = {measure.name: _read(directory / f"{measure.name}.json") for measure in CATALOGUE}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>tmemfs: what was measured</title><style>{_STYLE}</style>",
        "<h1>tmemfs: what was measured</h1>",
        _INTRODUCTION,
        *_about(run),
        "<h2>What has a goal</h2>",
        *_judged(goal | {"link": name} for name, result in found.items() for goal in (result or {}).get("goals", [])),
    ]
    for measure in CATALOGUE:
        parts.extend(_section(measure, found[measure.name], directory / f"{measure.name}.png"))
    target = directory / "index.html"
    target.write_text("\n".join(parts) + "\n")
    return target


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content


def _about(run: dict[str, Any]) -> Iterable[str]:
    """Yield a table about the machine and the run."""
    if run.get("quick"):
        yield (
            "<p class=note>This was a quick run: everything is small. It shows that the measures work; "
            "its figures mean little, and no goal is judged.</p>"
        )
    if run.get("interrupted"):
        yield "<p class=note>The run was interrupted; what had been measured until then is below.</p>"
    facts = {"command": run.get("command"), "began": run.get("began"), "took": run.get("took")}
    for name, value in {**facts, **run.get("machine", {})}.items():
        if isinstance(value, dict):
            facts[name] = ", ".join(f"{key} {one}" for key, one in value.items())
        elif name.endswith("_bytes"):
            facts[name.removesuffix("_bytes")] = f"{value / (1 << 30):.1f} GiB"
        else:
            facts[name] = value
    rows = (f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in facts.items() if value is not None)
    yield "<table>" + "".join(rows) + "</table>"


def _judged(goals: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Yield the results that have a goal, and how many are met."""
    found = [goal for goal in goals if goal["verdict"] != Verdict.REPORTED]
    counts = Counter(goal["verdict"] for goal in found)
    yield "<p>" + ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]) + ".</p>"
    yield from _goals(found)


def _goals(goals: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Yield goals as a table."""
    yield "<table><tr><th>what<th>goal<th>result<th>"
    for goal in goals:
        what = _text(goal["what"])
        if "link" in goal:
            what = f"<a href='#{goal['link']}'>{what}</a>"
        verdict = goal["verdict"] if goal["verdict"] in _CLASSES else ""
        shown = f"<td class={_CLASSES[verdict]}>{verdict}" if verdict else "<td>"
        yield f"<tr><td>{what}<td>{_text(goal['goal'])}<td><b>{_text(goal['result'])}</b>{shown}"
    yield "</table>"


def _section(measure: Measure, result: dict[str, Any] | None, picture: Path) -> Iterable[str]:
    title, *paragraphs = (importlib.import_module(f"bench.{measure.name}").__doc__ or "").split("\n\n")
    yield f"<h2 id={measure.name}>{measure.name}</h2><p>{_marked(title)}</p>"
    if result is None:
        yield "<p class=note>Not run.</p>"
        return
    yield from (f"<p>{_marked(paragraph)}</p>" for paragraph in paragraphs if not paragraph.startswith("    "))
    if "command" in result:
        yield f"<pre>{_text(result['command'])}</pre>"
    if "seconds" in result:
        took = f"Took {result['seconds']} s, and {result['processor_seconds']} s of processor time"
        yield f"<p>{took}; load before: {result['load_before']:.2f}.</p>"
    for why in ("skipped", "failed"):
        if why in result:
            yield f"<p class=note>{why.capitalize()}: {_text(result[why])}</p>"
    for note in result.get("figures", {}).get("notes", []):
        yield f"<p class=note>{_text(note)}</p>"
    if result.get("goals"):
        yield from _goals(result["goals"])
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        yield f"<p><img alt='{measure.name}' src='data:image/png;base64,{data}'></p>"
    yield f"<p><a href='{measure.name}.json'>all figures</a></p>"


def _marked(text: str) -> str:
    """Return a docstring as HTML: *words* and `code`."""
    shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*([^*\n]+)\*", r"<em>\1</em>", shown)


def _text(value: object) -> str:
    return html.escape(str(value))
