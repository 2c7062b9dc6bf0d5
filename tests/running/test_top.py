"""tmemfs top shows every mount of the machine, and one that hangs does not hold up the others."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import REAL, TINY, Place, run, state_of, wait_until
from tests.parts import pages_of
from tmemfs.kernel.kernelmount import MountEntry
from tmemfs.running.top import Sample, Watcher, line_of, mounts, table_of

ENTRY = MountEntry("0:77", Path("/data"), "fuse.tmemfs", "/mnt/nfs")
BEFORE = {
    "cache_hits": 100,
    "cache_misses": 100,
    "precache_succ_gets": 50,
    "backing_read_bytes": 1 << 20,
    "backing_write_bytes": 0,
    "backing_errors": 0,
    "cache_resident_bytes": 4096,
}
AFTER = {**BEFORE, "cache_hits": 160, "cache_misses": 140, "precache_succ_gets": 80, "backing_read_bytes": 5 << 20}


def shown(*samples: Sample) -> str:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    lines = [line_of(ENTRY, samples[0] if len(samples) > 1 else None, samples[-1])]
    console.print(table_of(lines))
    return console.export_text()


def test_rates_are_what_changed_between_two_looks() -> None:
    line = line_of(ENTRY, Sample(10.0, BEFORE), Sample(12.0, AFTER))
    assert line.hit_ratio == pytest.approx(90 / 100)
    assert line.asked_pages == 50
    assert line.backing_read_bytes == 2 << 20
    assert "90.0" in shown(Sample(10.0, BEFORE), Sample(12.0, AFTER))


def test_the_first_look_has_a_ratio_and_no_rates() -> None:
    line = line_of(ENTRY, None, Sample(10.0, BEFORE))
    assert line.hit_ratio == pytest.approx(150 / 200)
    assert line.asked_pages is None
    assert line.lender == ""
    assert "75.0" in shown(Sample(10.0, BEFORE))


def test_a_reset_and_a_pause_are_no_nonsense() -> None:
    reset = line_of(ENTRY, Sample(10.0, AFTER), Sample(11.0, {"cache_hits": 3, "cache_misses": 1}))
    assert (reset.hit_ratio, reset.asked_pages) == (0.75, 4)
    assert line_of(ENTRY, Sample(10.0, AFTER), Sample(11.0, AFTER)).hit_ratio is None


def test_trouble_is_told_in_the_line_of_the_mount() -> None:
    assert "hangs" in shown(Sample(1.0, BEFORE), Sample(2.0, trouble="does not answer: it hangs"))
    line = line_of(ENTRY, Sample(1.0, trouble="it hangs"), Sample(2.0, AFTER))
    assert line.asked_pages is None


def test_a_lost_lender_is_seen() -> None:
    assert "disconnected" in shown(Sample(1.0, {**BEFORE, "lender": "disconnected"}))


@pytest.mark.mount
def test_a_mount_is_found_and_its_reads_are_seen(place: Place) -> None:
    (place.source / "f").write_bytes(pages_of(1, 64))
    assert place.mount("--cache", "4M", "--pool", "8M").returncode == 0
    assert place.mountpoint in [entry.mountpoint for entry in mounts()]
    watcher = Watcher([place.mountpoint])
    watcher.look(30.0)
    (place.mountpoint / "f").read_bytes()
    (line,) = watcher.look(30.0)
    assert line.trouble == ""
    assert line.source == os.fspath(place.source)
    assert line.asked_pages
    assert line.cache_bytes == 64 * 4096
    top = (*REAL, "top", place.mountpoint, "--interval", "100ms")
    done = run(*top, "--json")
    assert done.returncode == 0, done.stderr
    assert [told["mountpoint"] for told in json.loads(done.stdout)] == [os.fspath(place.mountpoint)]
    done = run(*top, "--once")
    assert "CACHE/OF" in done.stdout
    assert "0/4" in done.stdout


@pytest.mark.mount
def test_a_mount_that_hangs_is_told_and_touched_by_one_thread_only(place: Place) -> None:
    process = place.serve(command=TINY)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: state_of(process.pid) == "T", "the process has stopped")
    watcher = Watcher([place.mountpoint])
    try:
        threads = set()
        for _ in range(3):
            (line,) = watcher.look(0.2)
            assert "hangs" in line.trouble
            threads |= set(watcher._hanging.values())
        assert len(threads) == 1
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.mount
def test_a_mount_with_another_control_name_says_so(place: Place) -> None:
    assert place.mount("--control-name", ".other").returncode == 0
    (line,) = Watcher([place.mountpoint]).look(30.0)
    assert "another --control-name" in line.trouble
    (line,) = Watcher([place.mountpoint], ".other").look(30.0)
    assert line.trouble == ""


def test_where_nothing_is_mounted_the_table_is_empty(place: Place) -> None:
    done = run(*REAL, "top", place.mountpoint, "--json", "--interval", "100ms")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
