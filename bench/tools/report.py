"""Report a measure: goals, JSON, and lines on the terminal."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.tools.children import ROOT, BenchError, interruptible, run
from bench.tools.verdict import Verdict

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """A result with its goal and verdict."""

    what: str
    goal: str
    result: str
    verdict: Verdict = Verdict.REPORTED

    def line(self) -> str:
        """Render as text."""
        if self.verdict in (Verdict.REPORTED, Verdict.UNJUDGED):
            return f"{self.what}: {self.result}"
        return f"{self.what}: {self.result} (goal {self.goal}): {self.verdict}"

    def row(self) -> str:
        """Render as a row of a Markdown table."""
        verdict = "–" if self.verdict in (Verdict.REPORTED, Verdict.UNJUDGED) else self.verdict
        return f"| {self.what} | {self.goal} | {self.result} | {verdict} |"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a measure."""

    goals: Sequence[Goal]
    figures: Figures


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the ratio of each pair."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def medians(values: Mapping[str, Sequence[float]], unit: str) -> str:
    """Return the median of each side as one line."""
    return "  " + ", ".join(f"{name} {median(found):,.1f} {unit}" for name, found in values.items())


def say(text: str) -> None:
    """Print to standard error; standard output is for the JSON."""
    print(text, file=sys.stderr, flush=True)


def machine() -> Figures:
    """Return a description of the machine and the code."""
    versions = {}
    for package in ("pyfuse3", "trio", "lz4", "xxhash"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "-"
    try:
        fio = run(["fio", "--version"], seconds=10).decode().strip()
    except BenchError:
        fio = "-"
    return {
        "code": _revision(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "swap_bytes": _swap_bytes(),
        "load": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
        "system": _system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "fio": fio,
        "packages": versions,
    }


def _revision() -> str:
    """Return the commit, with `-dirty` if files differ from it."""
    try:
        return run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=10"], seconds=10).decode().strip()
    except BenchError:
        return "-"


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "-")
    except OSError:
        return "-"


def _swap_bytes() -> int:
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return sum(int(line.split()[2]) for line in lines) << 10


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a command line with the options that every measure has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="write the JSON here instead of to standard output")
    made.add_argument("--unjudged", action="store_true", help="judge no goal: the sizes are too small for that")
    return made


def main(
    arguments: argparse.Namespace,
    measure: Callable[[], Outcome],
    picture: Callable[[Figures, Path], None] | None = None,
) -> None:
    """Run a measure as a program; write its picture beside the JSON if that is a file."""
    with interruptible():
        try:
            outcome = measure()
        except BenchError as error:
            sys.exit(f"bench: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
    if arguments.unjudged:
        outcome = replace(outcome, goals=[_unjudged(goal) for goal in outcome.goals])
    for goal in outcome.goals:
        say(goal.line())
    write(arguments.out, {"machine": machine(), **as_json(outcome)})
    if picture is not None and arguments.out is not None and "skipped" not in outcome.figures:
        picture(outcome.figures, arguments.out.with_suffix(".png"))


def _unjudged(goal: Goal) -> Goal:
    return goal if goal.verdict is Verdict.REPORTED else replace(goal, verdict=Verdict.UNJUDGED)


def as_json(outcome: Outcome) -> Figures:
    """Return an outcome as plain data."""
    return {"goals": [asdict(goal) for goal in outcome.goals], "figures": outcome.figures}


def write(path: Path | None, figures: Figures) -> None:
    """Write JSON to a file, or to standard output."""
    text = json.dumps(figures, indent=1) + "\n"
    if path is None:
        sys.stdout.write(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
