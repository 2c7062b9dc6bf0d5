"""tmemfs top shows all mounts; one that hangs or sends invalid counters does not affect the others."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import REAL, TINY, Place, run, state_of, wait_until
from tests.pagebytes import pages_of
from tmemcommon.mountinfo import MountEntry
from tmemfs.kernel.kernelmount import unmount
from tmemfs.lifecycle.controlsocket import MAX_ANSWER
from tmemfs.lifecycle.top import Line, Sample, Watcher, line_of, mounts, sample_of

ENTRY = MountEntry("0:77", Path("/data"), "fuse.tmemfs", "/mnt/nfs")
BEFORE: dict[str, object] = {
    "demand_hits": 150,
    "demand_pages": 200,
    "backing_read_bytes": 1 << 20,
    "backing_write_bytes": 0,
    "backing_errors": 0,
    "cache_resident_bytes": 4096,
    "cache_capacity_bytes": 1 << 20,
    "pool_lent_bytes": 1 << 16,
    "pool_original_bytes": 1 << 17,
    "hswap_size_bytes": 0,
    "hswap_pool_pages": 0,
    "hswap_overflow_pages": 0,
    "hswap_lost_pages": 0,
    "what_a_later_version_tells": "more",
}
AFTER = {**BEFORE, "demand_hits": 240, "demand_pages": 300, "backing_read_bytes": 5 << 20}


def told(at: float, values: dict[str, object]) -> Sample:
    sample = sample_of(at, json.dumps(values).encode())
    assert sample.trouble == ""
    return sample


def line(before: dict[str, object] | None, after: dict[str, object], seconds: float = 2.0) -> Line:
    return line_of(ENTRY, None if before is None else told(10.0, before), told(10.0 + seconds, after))


def test_rates_are_differences_between_two_samples() -> None:
    seen = line(BEFORE, {**AFTER, "backing_write_bytes": 10, "backing_errors": 3})
    assert seen.hit_ratio == pytest.approx(90 / 100)
    assert seen.seconds == 2.0
    assert seen.asked_bytes_per_second == 50 * 4096
    assert seen.backing_read_bytes_per_second == 2 << 20
    assert seen.backing_write_bytes_per_second == 5
    assert seen.backing_errors_per_second == 1.5


def test_the_first_sample_has_a_ratio_and_no_rates() -> None:
    seen = line(None, BEFORE)
    assert seen.hit_ratio == pytest.approx(150 / 200)
    assert seen.asked_bytes_per_second is seen.seconds is None
    assert seen.lender is None


def test_a_reset_and_an_idle_interval_give_valid_rates() -> None:
    seen = line(AFTER, {**BEFORE, "demand_hits": 3, "demand_pages": 4}, 1.0)
    assert (seen.hit_ratio, seen.asked_bytes_per_second) == (0.75, 4 * 4096)
    assert line(AFTER, AFTER).hit_ratio is None
    assert line(AFTER, AFTER, 0.0).asked_bytes_per_second is None


def test_swapped_pages_count_in_pool_and_overflow_file() -> None:
    swap = {"hswap_size_bytes": 1 << 24, "hswap_pool_pages": 10, "hswap_overflow_pages": 6, "hswap_lost_pages": 1}
    seen = line(None, {**BEFORE, **swap})
    assert (seen.swap_bytes, seen.swap_capacity_bytes, seen.swap_lost_pages) == (16 * 4096, 1 << 24, 1)


def test_each_trouble_is_reported() -> None:
    assert line(BEFORE, AFTER).troubles() == []
    bad = {**AFTER, "lender": "disconnected", "backing_errors": 5, "hswap_lost_pages": 3}
    tmemd, errors, lost = line(BEFORE, bad).troubles()
    assert "tmemd" in tmemd
    assert "2.5 errors a second from '/mnt/nfs'" in errors
    assert "3 pages" in lost
    (hangs,) = line_of(ENTRY, told(1.0, BEFORE), Sample(2.0, trouble="it hangs")).troubles()
    assert hangs == "it hangs"
    assert line_of(ENTRY, Sample(1.0, trouble="it hangs"), told(2.0, AFTER)).asked_bytes_per_second is None


INVALID = {
    "nothing": b"",
    "no JSON": b"\x1b[2J",
    "no text": b'{"demand_hits": "\xff"}',
    "a list": b"[]",
    "a depth that no parser takes": b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "only a part": b'{"demand_hits": 1}',
    **{
        f"{value!r} for a number": json.dumps({**BEFORE, "demand_hits": value}).encode()
        for value in (-1, 1.5, "7", True, None, [1], 1 << 63, 10**300, float("nan"), float("inf"))
    },
    "another word for the lender": json.dumps({**BEFORE, "lender": "\x1b[31mconnected"}).encode(),
    "a long end": json.dumps({**BEFORE, "x": "x" * MAX_ANSWER}).encode()[:MAX_ANSWER],
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID.keys())
def test_invalid_counters_are_the_trouble_of_their_mount(content: bytes) -> None:
    sample = sample_of(1.0, content)
    assert sample.counters is None
    (trouble,) = line_of(ENTRY, told(0.0, BEFORE), sample).troubles()
    assert trouble.startswith("its counters cannot be read")
    assert trouble.isprintable()
    assert len(trouble) < 200


def test_the_largest_numbers_are_valid() -> None:
    most = {name: (1 << 63) - 1 if isinstance(value, int) else value for name, value in BEFORE.items()}
    seen = line(BEFORE, most, 0.001)
    assert seen.hit_ratio is not None
    assert 0 <= seen.hit_ratio <= 1
    json.dumps(seen.swap_bytes)


@pytest.mark.mount
def test_a_mount_and_its_reads_are_shown(place: Place) -> None:
    (place.source / "f").write_bytes(pages_of(1, 64))
    assert place.mount("--cache", "4M", "--pool", "8M").returncode == 0
    assert place.mountpoint in [entry.mountpoint for entry in mounts()]
    watcher = Watcher([place.mountpoint])
    watcher.sample(30.0)
    (place.mountpoint / "f").read_bytes()
    (seen,) = watcher.sample(30.0)
    assert seen.trouble == ""
    assert seen.source == os.fspath(place.source)
    assert seen.asked_bytes_per_second
    assert seen.cache_bytes == 64 * 4096
    top = (*REAL, "top", place.mountpoint, "--interval", "100ms")
    done = run(*top, "--json")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert told["mountpoint"] == os.fspath(place.mountpoint)
    assert told["cache_capacity_bytes"] == 4 << 20
    assert told["backing_read_bytes_per_second"] == 0
    done = run(*top, "--once")
    assert "256K/4M" in done.stdout


@pytest.mark.mount
def test_a_mount_that_hangs_is_reported(place: Place) -> None:
    process = place.serve(command=TINY)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: state_of(process.pid) == "T", "the process has stopped")
    watcher = Watcher([place.mountpoint])
    try:
        for _ in range(3):
            (seen,) = watcher.sample(0.2)
            assert "hangs" in seen.trouble
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.mount
def test_a_mount_with_another_control_name_is_sampled(place: Place) -> None:
    assert place.mount("--control-name", ".other").returncode == 0
    (seen,) = Watcher([place.mountpoint]).sample(30.0)
    assert seen.trouble == ""


@pytest.mark.mount
def test_a_mountpoint_with_control_characters_is_escaped(place: Place) -> None:
    wild = place.mountpoint.parent / "[/]\x1b[31m[red]\n\udcff"
    wild.mkdir(parents=True)
    try:
        assert place.mount().returncode == 0
        assert place.mount(mountpoint=wild).returncode == 0
        done = run(*REAL, "top", place.mountpoint, wild, "--once", "--interval", "100ms")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.replace("\n", "").isprintable()
        assert "[/]\\x1b[31m[red]\\n\\xff" in done.stdout
        assert "0/64M" in done.stdout
    finally:
        if place.is_mounted(wild):
            unmount(wild, lazy=True)


def test_a_path_without_a_mount_is_refused(place: Place) -> None:
    done = run(*REAL, "top", place.mountpoint, "--json", "--interval", "100ms")
    assert (done.returncode, done.stdout) == (2, "")
    (error,) = done.stderr.splitlines()
    assert f"'{place.mountpoint}' is not a tmemfs mount" in error
