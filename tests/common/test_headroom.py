"""How much may be allocated: limits of the machine and of memory cgroups, in both versions."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tmemcommon.headroom import CGROUP_RESERVE, Headroom
from tmemcommon.sizes import MIB

ROOM = 100 * MIB


class Machine:
    """A fake /proc and /sys of a machine with so much memory available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 999 kB\nMemAvailable:   {1000 * MIB // 1024} kB\nBuffers: 1 kB\n")
        self.write("proc/self/cgroup", "")
        self.write("proc/self/mountinfo", "1 1 0:1 / / rw - ext4 /dev/vda rw\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def mount_at(self, path: bytes) -> None:
        """Add a mount at any path, as a user could."""
        with open(self.root / "proc/self/mountinfo", "ab") as table:
            table.write(b"8 1 0:8 / " + path + b" rw - fuse.x x rw\n")

    def unified(self, membership: str, below: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{membership}\n")
        self.write("proc/self/mountinfo", f"9 1 0:9 {below} /cg rw shared:1 - cgroup2 cgroup2 rw,nsdelegate\n")

    def legacy(self, membership: str) -> None:
        self.write("proc/self/cgroup", f"7:cpu:/elsewhere\n4:cpuset,memory:{membership}\n0::/\n")
        self.write("proc/self/mountinfo", "9 1 0:9 / /cg/memory rw - cgroup cgroup rw,cpuset,memory\n")

    def cgroup(self, path: str, limit: int | str, usage: int, idle: int = 0, high: str = "max") -> None:
        self.write(f"cg/{path}/memory.max", f"{limit}\n")
        self.write(f"cg/{path}/memory.high", f"{high}\n")
        self.write(f"cg/{path}/memory.current", f"{usage}\n")
        self.write(f"cg/{path}/memory.stat", f"anon 5\ninactive_file {idle}\nactive_file 99999999999\n")

    def legacy_cgroup(self, path: str, limit: int, usage: int, idle: int = 0) -> None:
        self.write(f"cg/memory/{path}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"cg/memory/{path}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"cg/memory/{path}/memory.stat", f"inactive_file 99999999999\ntotal_inactive_file {idle}\n")

    def refusal(self, wanted: int = MIB, reserve: int = 0) -> str | None:
        return Headroom(reserve, self.root).refusal(wanted)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_allocations_must_leave_the_reserve(machine: Machine) -> None:
    assert machine.refusal(MIB, 999 * MIB) is None
    reason = machine.refusal(2 * MIB, 999 * MIB)
    assert reason is not None
    assert "1000M left" in reason
    assert "reserved" in reason


def test_without_a_reserve_only_cgroups_refuse(machine: Machine) -> None:
    machine.unified("/a")
    machine.cgroup("a", 2000 * MIB, 0)
    headroom = Headroom(None, machine.root)
    assert headroom.refusal(1500 * MIB) is None, "more than the machine has available"
    assert headroom.refusal(2000 * MIB) is not None


def test_a_cgroup_refuses_before_its_limit(machine: Machine) -> None:
    machine.unified("/a/b")
    machine.cgroup("a/b", ROOM, ROOM - CGROUP_RESERVE - MIB)
    assert machine.refusal(MIB) is None
    reason = machine.refusal(MIB + 1)
    assert reason is not None
    assert "cgroup b" in reason


@pytest.mark.parametrize("tight", ["a", "a/b", "a/b/c"])
def test_every_ancestor_limits(machine: Machine, tight: str) -> None:
    machine.unified("/a/b/c")
    for path in ("a", "a/b", "a/b/c"):
        machine.cgroup(path, ROOM if path == tight else "max", ROOM - CGROUP_RESERVE)
    assert machine.refusal() is not None


@pytest.mark.parametrize("tight", ["", "a", "a/b"])
def test_every_ancestor_limits_in_version_1(machine: Machine, tight: str) -> None:
    machine.legacy("/a/b")
    for path in ("", "a", "a/b"):
        machine.legacy_cgroup(path, ROOM if path == tight else 9223372036854771712, ROOM - CGROUP_RESERVE)
    assert machine.refusal() is not None
    machine.legacy_cgroup(tight, ROOM, 0)
    assert machine.refusal() is None


def test_inactive_file_pages_count_as_free_in_both_versions(machine: Machine) -> None:
    machine.unified("/a")
    machine.cgroup("a", ROOM, ROOM, idle=CGROUP_RESERVE + MIB)
    assert machine.refusal() is None
    assert machine.refusal(MIB + 1) is not None
    machine.legacy("/a")
    machine.legacy_cgroup("a", ROOM, ROOM, idle=CGROUP_RESERVE + MIB)
    assert machine.refusal() is None
    assert machine.refusal(MIB + 1) is not None


def test_memory_high_limits_like_memory_max(machine: Machine) -> None:
    machine.unified("/a")
    machine.cgroup("a", "max", ROOM, high=str(ROOM))
    assert machine.refusal() is not None


def test_a_cgroup_namespace_has_its_own_root(machine: Machine) -> None:
    machine.unified("/a/b", below="/a")
    machine.cgroup("b", ROOM, ROOM)
    assert machine.refusal() is not None
    machine.unified("/../other", below="/")
    machine.cgroup("", ROOM, ROOM)
    assert machine.refusal() is not None


def test_a_process_that_is_moved_is_limited_by_its_new_cgroup(machine: Machine) -> None:
    machine.unified("/a")
    machine.cgroup("a", ROOM, 0)
    machine.cgroup("b", ROOM, ROOM)
    headroom = Headroom(0, machine.root)
    assert headroom.refusal(MIB) is None
    machine.unified("/b")
    assert headroom.refusal(MIB) is not None


def test_a_changed_limit_applies_at_once(machine: Machine) -> None:
    machine.unified("/a")
    machine.cgroup("a", ROOM, 0)
    headroom = Headroom(0, machine.root)
    assert headroom.refusal(MIB) is None
    machine.cgroup("a", MIB, 0)
    assert headroom.refusal(MIB) is not None


def test_without_these_files_there_is_no_limit(tmp_path: Path) -> None:
    assert Headroom(MIB, tmp_path).refusal(MIB) is None


def test_the_files_of_this_machine_are_read() -> None:
    assert Headroom(0).refusal(4096) is None
    assert Headroom(1 << 60).refusal(4096) is not None


def test_a_mount_at_a_path_that_is_not_utf8_changes_nothing(machine: Machine) -> None:
    machine.legacy("/mine")
    machine.mount_at(b"/home/a\rb\xe2\x80\xa8c\xfe")
    assert Headroom(0, machine.root).refusal(MIB) is None


@pytest.mark.parametrize("file", ["proc/meminfo", "proc/self/cgroup", "cg/a/memory.max", "cg/a/memory.current"])
def test_without_a_free_descriptor_every_allocation_is_refused(
    machine: Machine, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.unified("/a")
    machine.cgroup("a", ROOM, 0)
    headroom = Headroom(0, machine.root)
    assert headroom.refusal(MIB) is None
    read = Path.read_text

    def read_text(path: Path, *arguments: str) -> str:
        if path == machine.root / file:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert "cannot be read" in str(headroom.refusal(MIB))
