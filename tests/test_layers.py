"""Imports only point down, and errno is translated in one module."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(folder: str, package: str) -> dict[str, Path]:
    """Return the modules of a package by their dotted names."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {f"{package}." + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts): path for path in paths}


GUEST = modules("tmemfs", "tmemfs")
BACKEND = modules("backend/tmem", "tmem")
COMMON = modules("backend/tmemcommon", "tmemcommon")
LENDING = {name: path for name, path in BACKEND.items() if name.startswith("tmem.lending.")}
POOL = {name: path for name, path in BACKEND.items() if name not in LENDING}
BENCH = modules("bench", "bench")
ALL = {**COMMON, **GUEST, **BACKEND, **BENCH}

# The folders of each package from the ground up: a module imports from its own folder and from those before it.
# Modules outside of the folders are shared by all, or assemble the rest.
FLOORS = {
    "tmemfs": ("cache", "inodes", "kernel", "io", "namespace", "fuse", "watching", "hswap", "virtual", "lifecycle"),
    "tmem.lending": ("protocol", "lender", "guest", "daemon", "control"),
    "bench": ("tools", "models", "subjects"),
}
# Thin trio adapters over pure logic; all other modules of the backend are plain calls.
LENDING_ADAPTERS = {
    *(f"tmem.lending.daemon.{name}" for name in ("server", "broker", "connection", "executor", "workerqueue", "tmemd")),
    "tmem.lending.guest.client",
}
# The decisions of lending, and the protocol: messages and the time are arguments.
LENDING_DECIDES = sorted(name for name in LENDING if name.split(".")[2] in ("lender", "protocol"))
# Modules that talk to the kernel; `guest` only uses a type of pyfuse3.
SPEAKS_FUSE = {
    "tmemfs.guest",
    *(f"tmemfs.fuse.{name}" for name in ("fs", "handler", "directories", "replies")),
    *(f"tmemfs.kernel.{name}" for name in ("session", "kernelcache", "eager")),
}
# Modules that know the process and the mount; nothing below may import them.
TOP = {
    *("tmemfs.cli", "tmemfs.__main__", "tmemfs.guest", "tmemfs.kernel.session"),
    *(name for name in GUEST if name.startswith("tmemfs.lifecycle.")),
}
PURE = ("tmemfs.balloon", "tmemfs.cache.admission", "tmemfs.io.readahead")


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports at run time, not those for types only."""
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


def within(path: Path) -> set[str]:
    """Return the modules of this project that a module imports."""
    return {part for name in imported(path) for part in (name, name.rpartition(".")[0]) if part in ALL}


@pytest.mark.parametrize("name", COMMON)
def test_the_common_package_imports_no_other(name: str) -> None:
    assert not packages(COMMON[name]) & {"tmem", "tmemfs", "pyfuse3"}
    assert "trio" not in packages(COMMON[name]) or name == "tmemcommon.wakeup"


@pytest.mark.parametrize("name", POOL)
def test_the_pool_imports_neither_files_nor_command_lines(name: str) -> None:
    assert not packages(POOL[name]) & {"click", "pathlib", "rich"}


@pytest.mark.parametrize("name", POOL)
def test_the_backend_does_not_import_the_guest(name: str) -> None:
    assert not packages(BACKEND[name]) & {"tmemfs", "pyfuse3", "trio"}


@pytest.mark.parametrize("name", LENDING)
def test_lending_imports_no_guest_and_only_its_adapters_import_trio(name: str) -> None:
    assert not packages(LENDING[name]) & {"tmemfs", "pyfuse3"}
    if name not in LENDING_ADAPTERS:
        assert "trio" not in packages(LENDING[name])


@pytest.mark.parametrize("name", LENDING_DECIDES)
def test_lending_decides_without_clock_system_or_scheduler(name: str) -> None:
    assert not packages(LENDING[name]) & {"trio", "time", "threading", "os", "socket", "select", "random", "asyncio"}
    assert {other for other in within(LENDING[name]) if other in LENDING} <= {*LENDING_DECIDES}
    assert not [
        node for node in ast.walk(ast.parse(LENDING[name].read_text())) if isinstance(node, ast.AsyncFunctionDef)
    ]


@pytest.mark.parametrize("package", FLOORS)
def test_imports_point_down(package: str) -> None:
    floors = FLOORS[package]
    depth = package.count(".") + 1
    folders = {
        name: name.split(".")[depth] for name in ALL if name.startswith(f"{package}.") and name.count(".") > depth
    }
    assert set(folders.values()) == set(floors)
    up = [
        (name, other)
        for name, folder in folders.items()
        for other in within(ALL[name])
        if other in folders and floors.index(folders[other]) > floors.index(folder)
    ]
    assert up == []


def test_imports_have_no_circle() -> None:
    graph = {name: within(path) - {name} for name, path in ALL.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("name", sorted(set(GUEST) - TOP))
def test_nothing_below_lifecycle_imports_it(name: str) -> None:
    assert not within(GUEST[name]) & TOP


@pytest.mark.parametrize("name", sorted(set(GUEST) - TOP - {"tmemfs.fuse.fs"}))
def test_only_the_guest_assembles_the_operations(name: str) -> None:
    assert "tmemfs.fuse.fs" not in within(GUEST[name])


@pytest.mark.parametrize("name", sorted(set(GUEST) - SPEAKS_FUSE))
def test_only_modules_at_the_kernel_import_pyfuse3(name: str) -> None:
    assert "pyfuse3" not in packages(GUEST[name])


@pytest.mark.parametrize("name", sorted(set(GUEST) - {"tmemfs.fuse.handler"}))
def test_only_the_handler_uses_fuse_errors(name: str) -> None:
    names = {node.id for node in ast.walk(ast.parse(GUEST[name].read_text())) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(ast.parse(GUEST[name].read_text())) if isinstance(node, ast.Attribute)}
    assert "FUSEError" not in names | attributes | {full.split(".")[-1] for full in imported(GUEST[name])}


@pytest.mark.parametrize("name", PURE)
def test_the_core_decides_without_clock_or_scheduler(name: str) -> None:
    assert not packages(GUEST[name]) & {"trio", "time", "threading", "os"}
    assert not [node for node in ast.walk(ast.parse(GUEST[name].read_text())) if isinstance(node, ast.AsyncFunctionDef)]
