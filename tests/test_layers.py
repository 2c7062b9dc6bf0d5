"""Imports only point down, errno is translated in one file, and a module is short enough to be read."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUEST = {path.stem: path for path in sorted((ROOT / "tmemfs").glob("*.py"))}
BACKEND = {path.stem: path for path in sorted((ROOT / "backend" / "tmem").glob("*.py"))}
LENDING = {path.stem: path for path in sorted((ROOT / "backend" / "tmem" / "lending").glob("*.py"))}
MAX_LINES = 350

# Thin trio adapters over pure logic; everything else in the backend is called, never scheduled.
LENDING_ADAPTERS = {"server", "broker", "executor", "waiting", "tmemd", "client"}
# What decides about lending, and the protocol: driven by messages and a clock that is handed in.
LENDING_DECIDES = (
    *("account", "actions", "asking", "claiming", "division", "governor", "ledger", "lender", "messages", "slabmap"),
    *("stats", "taking", "verbs", "wire"),
)
# What speaks to the kernel; `guest` only names the type of what it hands over.
SPEAKS_FUSE = {"fs", "session", "kernelcache", "guest", "answer", "directories", "eager", "replies"}
# What knows the process and the mount; below them nothing may.
TOP = {"cli", "top", "__main__", "mount", "daemon", "session", "remote", "preflight", "kernelmount", "guest"}


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports when it runs (not what it imports for types only)."""
    tree = ast.parse(path.read_text())
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its layer"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def siblings(path: Path, package: str, modules: dict[str, Path]) -> set[str]:
    """Return which modules of the same package a module imports."""
    found = set()
    for name in imported(path):
        below = name.removeprefix(f"{package}.").split(".")[0]
        if name.startswith(f"{package}.") and below in modules:
            found.add(below)
    return found


@pytest.mark.parametrize("name", BACKEND)
def test_the_backend_knows_nothing_of_the_guest(name: str) -> None:
    assert not packages(BACKEND[name]) & {"tmemfs", "pyfuse3", "trio"}


@pytest.mark.parametrize("name", LENDING)
def test_lending_knows_nothing_of_the_guest_and_only_its_adapters_are_scheduled(name: str) -> None:
    assert not packages(LENDING[name]) & {"tmemfs", "pyfuse3"}
    if name not in LENDING_ADAPTERS:
        assert "trio" not in packages(LENDING[name])


@pytest.mark.parametrize("name", LENDING_DECIDES)
def test_lending_decides_without_clock_system_or_scheduler(name: str) -> None:
    assert not packages(LENDING[name]) & {"trio", "time", "threading", "os", "socket", "select", "random", "asyncio"}
    siblings_of = {full.split(".")[2] for full in imported(LENDING[name]) if full.startswith("tmem.lending.")}
    assert siblings_of <= {*LENDING_DECIDES}
    assert not [
        node for node in ast.walk(ast.parse(LENDING[name].read_text())) if isinstance(node, ast.AsyncFunctionDef)
    ]


@pytest.mark.parametrize(("package", "modules"), [("tmemfs", GUEST), ("tmem", BACKEND), ("tmem.lending", LENDING)])
def test_imports_have_no_circle(package: str, modules: dict[str, Path]) -> None:
    graph = {name: siblings(path, package, modules) for name, path in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", sorted(set(GUEST) - TOP))
def test_nothing_below_the_mount_imports_what_runs_it(name: str) -> None:
    assert not siblings(GUEST[name], "tmemfs", GUEST) & TOP


@pytest.mark.parametrize("name", sorted(set(GUEST) - TOP - {"fs"}))
def test_only_the_guest_assembles_the_operations(name: str) -> None:
    assert "fs" not in siblings(GUEST[name], "tmemfs", GUEST)


@pytest.mark.parametrize("name", sorted(set(GUEST) - SPEAKS_FUSE))
def test_only_what_speaks_to_the_kernel_imports_pyfuse3(name: str) -> None:
    assert "pyfuse3" not in packages(GUEST[name])


@pytest.mark.parametrize("name", sorted(set(GUEST) - {"answer"}))
def test_only_answer_knows_fuse_errors(name: str) -> None:
    names = {node.id for node in ast.walk(ast.parse(GUEST[name].read_text())) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(ast.parse(GUEST[name].read_text())) if isinstance(node, ast.Attribute)}
    assert "FUSEError" not in names | attributes | {full.split(".")[-1] for full in imported(GUEST[name])}


@pytest.mark.parametrize("name", ["balloon", "pagecache", "readahead"])
def test_the_core_decides_without_clock_or_scheduler(name: str) -> None:
    assert not packages(GUEST[name]) & {"trio", "time", "threading", "os"}
    assert not [node for node in ast.walk(ast.parse(GUEST[name].read_text())) if isinstance(node, ast.AsyncFunctionDef)]


@pytest.mark.parametrize(
    "path", [*GUEST.values(), *BACKEND.values(), *LENDING.values()], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_module_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
