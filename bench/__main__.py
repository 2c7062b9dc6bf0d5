"""Run the measures one after the other, each as a child process with a time limit.

    python -m bench [--quick] [--traces DIR] [--only NAME …] [--out DIRECTORY]

Writes NAME.json for each measure, its picture if it has one, and index.html into bench/results/. index.html is written
again after each measure, so an interrupted run keeps its results. Each measure is a program as well (`python -m
bench.cost` …); its docstring says what it measures. `--quick` makes all of them small: it shows that they run, and
judges no goal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import selectors
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import page
from bench.catalogue import CATALOGUE, QUICK_BOUND, Measure, missing
from bench.tools.children import BenchError, end, interruptible, start, undisturbed
from bench.tools.report import Figures, Goal, machine, write

_LOOK_SECONDS = 0.25
_SAID = 600  # bytes of a failed measure's last output


class Run:
    """One run of measures: its results and its progress."""

    def __init__(self, asked: Namespace, progress: Progress) -> None:
        self._quick: bool = asked.quick
        self._traces: Path | None = asked.traces.resolve() if asked.traces is not None else None
        self._out: Path = asked.out
        self._progress = progress
        self._began = time.monotonic()
        self.about: Figures = {
            "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
            "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "quick": self._quick,
            "machine": machine(),
        }
        self.results: dict[str, Figures] = {}

    def measure(self, measure: Measure, task: int) -> None:
        """Run one measure, or print why it is skipped."""
        command = measure.words(self._quick, self._traces)
        head: Figures = {"command": shlex.join(["python", "-m", *command])}
        reason = missing(measure.needs, self._traces)
        if reason:
            result = {"skipped": reason}
            self._progress.console.print(f"[bold]{measure.name}[/]: skipped: {reason}", soft_wrap=True)
        else:
            self._progress.console.print(f"[bold]{measure.name}[/]")
            began, used = time.monotonic(), _processor_seconds()
            head["load_before"] = os.getloadavg()[0]
            bound = QUICK_BOUND if self._quick else measure.bound
            result = self._child(measure.name, [sys.executable, "-m", *command], bound, task)
            head["seconds"] = round(time.monotonic() - began, 1)
            head["processor_seconds"] = round(_processor_seconds() - used, 1)
        self.results[measure.name] = result | head
        write(self._out / f"{measure.name}.json", self.results[measure.name])
        self.save()

    def _child(self, name: str, command: list[str], bound: float, task: int) -> Figures:
        """Run a measure as a child; return its result, or why it failed."""
        target = self._out / f"{name}.json"
        child = start([*command, "--out", target], stderr=subprocess.PIPE)
        try:
            said, in_time = self._watch(child, time.monotonic() + bound, task)
        finally:
            end(child)
        if not in_time:
            return {"failed": f"did not end within {bound:g} s"}
        if child.returncode != 0 or not target.exists():
            last = said.decode(errors="replace").strip()[-_SAID:]
            self._progress.console.print(f"  failed: {last}", style="red", markup=False, soft_wrap=True)
            return {"failed": last or f"ended with {child.returncode}"}
        found: Figures = json.loads(target.read_text())
        return found

    def _watch(self, child: subprocess.Popen[bytes], limit: float, task: int) -> tuple[bytes, bool]:
        """Print a child's output until it ends; return the last of it, and False if it took too long."""
        assert child.stderr is not None
        said, line = b"", b""
        with child.stderr as stream, selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while time.monotonic() < limit:
                if selector.select(_LOOK_SECONDS):
                    data = os.read(stream.fileno(), 1 << 16)
                    if not data:
                        child.wait(5.0)
                        return said, True
                    said = (said + data)[-4 * _SAID :]
                    *lines, line = (line + data).split(b"\n")
                    for one in lines:
                        self._progress.console.print(
                            "  " + one.decode(errors="replace"), markup=False, style="dim", soft_wrap=True
                        )
                self._progress.update(task)  # type: ignore[arg-type]  # rich's TaskID is an int
                self._progress.refresh()
        return said, False

    def save(self) -> Path:
        """Write index.html with the results so far."""
        seconds = int(time.monotonic() - self._began)
        self.about["took"] = f"{seconds // 60} min {seconds % 60:02} s"
        write(self._out / page.RUN, self.about)
        return page.build(self._out)


def _processor_seconds() -> float:
    """Return the processor time of all ended children and their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(asked: Namespace) -> int:
    """Run the chosen measures; return 1 when one failed, 130 when interrupted."""
    known = {measure.name: measure for measure in CATALOGUE}
    unknown = set(asked.only) - set(known)
    if unknown:
        raise BenchError(f"no measure is called {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    chosen = [known[name] for name in asked.only] or list(CATALOGUE)
    for measure in chosen:
        for old in (asked.out / f"{measure.name}.json", asked.out / f"{measure.name}.png"):
            old.unlink(missing_ok=True)
    console = Console(highlight=False)
    if asked.quick:
        console.print("quick run: everything is small, no goal is judged")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    interrupted = False
    # No refresh thread: children are forked while the bar is shown.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("measures", total=len(chosen))
        whole = Run(asked, progress)
        try:
            for measure in chosen:
                progress.update(task, description=measure.name)
                whole.measure(measure, task)
                progress.advance(task)
        except KeyboardInterrupt:
            interrupted = whole.about["interrupted"] = True
        with undisturbed():
            written = whole.save()
    with undisturbed():
        _summarize(whole.results)
        console.print(
            f"{'interrupted; what there is' if interrupted else 'everything'} is in {written}", soft_wrap=True
        )
    return 130 if interrupted else int(any("failed" in result for result in whole.results.values()))


def _summarize(results: dict[str, Figures]) -> None:
    """Print all goals as a Markdown table, and the skipped and failed measures."""
    print("| what | goal | result | verdict |\n|---|---|---|---|")
    for name, result in results.items():
        for goal in result.get("goals", []):
            print(Goal(**goal).row())
        for why in ("skipped", "failed"):
            if why in result:
                print(f"| {name} | – | {why}: {result[why]} | – |")


def main() -> None:
    """Run as a program."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, default=page.RESULTS, help="directory for the results")
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
