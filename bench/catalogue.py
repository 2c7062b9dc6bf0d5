"""The measures that `python -m bench` runs, in this order, with their command lines for whole and quick runs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

QUICK_BOUND = 120.0  # seconds for one measure


@dataclass(frozen=True, slots=True)
class Measure:
    """A module of this package. `bound` is the time limit of the whole measure in seconds."""

    name: str
    whole: str = ""
    quick: str = ""
    bound: float = 120.0
    needs: tuple[str, ...] = ("fuse",)
    traces: bool = False  # uses traces if there are any

    def words(self, quick: bool, traces: Path | None) -> list[str]:
        """Return its command line after `python -m`."""
        words = [f"bench.{self.name}", *(self.quick if quick else self.whole).split()]
        if quick:
            words.append("--unjudged")
        if traces is not None and (self.traces or "traces" in self.needs):
            words += ["--traces", os.fspath(traces)]
        return words


CATALOGUE = (
    Measure(
        "claim",
        quick="--requests 120 --steps 2 --cache 1 --only zipf --guests 2 --fast",
        bound=900,
        needs=("fuse", "fio"),
        traces=True,
    ),
    Measure("policies", whole="--limit 150000", quick="--limit 4000", bound=240, needs=("traces",)),
    Measure("division", whole="--limit 40000", quick="--limit 2000", bound=400, needs=("traces",)),
    Measure("poolalone", whole="--pages 6000", quick="--pages 500 --rounds 1 --max-pages 30000", bound=240, needs=()),
    Measure("cost", whole="--pairs 11", quick="--pairs 1 --cache 8", bound=300),
    Measure("peers", whole="--rounds 2", quick="--rounds 1 --seconds 0.1 --size 1", bound=300, needs=("fuse", "fio")),
    Measure("poolhit", quick="--pairs 2 --size 4"),
    Measure("borrowed", whole="--size 8", quick="--mounts 1 --size 4"),
    Measure("lendspeed", quick="--size 32 --guests 4 --rounds 1", needs=()),
    Measure("scale", whole="--slabs 10000 --quiet 15", quick="--slabs 300 --quiet 2", needs=()),
    Measure(
        "swap", whole="--rounds 2 --limit 8", quick="--rounds 1 --slow-rounds 0", bound=400, needs=("fuse", "root")
    ),
    Measure("secondpass", whole="--large 32", quick="--rounds 1 --large 4 --latency 1ms"),
    Measure("hits", whole="--seconds 0.4", quick="--pairs 1 --seconds 0.2 --size 8", needs=("fuse", "fio")),
    Measure("metadata", quick="--pairs 1 --seconds 0.1"),
    Measure(
        "memory", whole="--cache 64 --pool 128 --big 256 --small 16", quick="--cache 8 --pool 16 --big 32 --small 8"
    ),
)


def missing(needs: tuple[str, ...], traces: Path | None) -> str:
    """Return which needs are not met here; an empty text if all are."""
    reasons = {
        "fuse": "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse is missing or may not be opened",
        "fio": "" if shutil.which("fio") else "the program fio is missing: make setup installs it",
        "root": "" if os.geteuid() == 0 else "it needs root",
        "traces": _about_traces(traces),
    }
    return "; ".join(reasons[need] for need in needs if reasons[need])


def _about_traces(traces: Path | None) -> str:
    if traces is None:
        return "no traces were given: make bench TRACES=DIR"
    return "" if traces.is_dir() else f"{traces} is no directory"
