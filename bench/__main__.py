"""Run all measures and print the table with goals and results.

    python -m bench [--traces DIR] [--quick] [--only NAME …] [--out bench/results/measures.json]

Each measure is also a program of its own (`python -m bench.hits` …) that says in its docstring what it measures.
`--quick` makes all of them small: it shows that they work, and its figures mean little.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from bench import hits, memory, metadata, policies, poolhit, secondpass
from bench.children import BenchError, interruptible
from bench.content import MIB
from bench.report import Figures, Goal, Outcome, as_json, machine, parser, say, write

DEFAULT_OUT = Path(__file__).parent / "results" / "measures.json"
QUICK_LIMIT = 20_000


def measures(traces: Path | None, quick: bool) -> dict[str, Callable[[], Outcome]]:
    """Return the measures by name."""
    if quick:
        return {
            "hits": lambda: hits.measure(2, 0.5, 8 * MIB),
            "poolhit": lambda: poolhit.measure(2, 4 * MIB),
            "secondpass": lambda: secondpass.measure(1, MIB, 4 * MIB),
            "memory": lambda: memory.measure(8 * MIB, 16 * MIB, 32 * MIB, 8 * MIB),
            "metadata": lambda: metadata.measure(2, 0.3),
            "policies": lambda: policies.measure(traces, limit=QUICK_LIMIT),
        }
    return {
        "hits": hits.measure,
        "poolhit": poolhit.measure,
        "secondpass": secondpass.measure,
        "memory": memory.measure,
        "metadata": metadata.measure,
        "policies": lambda: policies.measure(traces),
    }


def run(asked: Namespace) -> int:
    """Run what was asked for; return 1 when a goal was missed or a measure failed."""
    chosen = measures(asked.traces, asked.quick)
    unknown = set(asked.only) - set(chosen)
    if unknown:
        raise BenchError(f"no measure is called {', '.join(sorted(unknown))}: there are {', '.join(chosen)}")
    goals: list[Goal] = []
    found: Figures = {"machine": machine(), "quick": asked.quick, "measures": {}}
    for name in asked.only or chosen:
        say(f"\n== {name}")
        began, load = time.monotonic(), os.getloadavg()[0]
        try:
            outcome = chosen[name]()
        except BenchError as error:
            say(f"bench: {name}: {error}")
            outcome = Outcome([Goal(name, "a figure", f"failed: {error}", None)], {"failed": str(error)})
        goals.extend(outcome.goals)
        spent = {"seconds": round(time.monotonic() - began, 1), "load_before": load}
        found["measures"][name] = as_json(outcome) | spent
    write(asked.out, found)
    print("| what | goal | result | met |\n|---|---|---|---|")
    for goal in goals:
        print(goal.row())
    return 0 if all(goal.met or goal.result.startswith("skipped") for goal in goals) else 1


def main() -> None:
    """Run as a program."""
    command = parser(__doc__)
    command.set_defaults(out=DEFAULT_OUT)
    command.add_argument("--traces", type=Path, help="directory with traces for the policies")
    command.add_argument("--quick", action="store_true", help="small sizes, little meaning")
    command.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only these measures")
    with interruptible():
        try:
            code = run(command.parse_args())
        except BenchError as error:
            sys.exit(f"bench: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
    sys.exit(code)


if __name__ == "__main__":
    main()
