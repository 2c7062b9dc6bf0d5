"""Small seeded runs of the measures. Asserted is the shape of their results, not speed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import lz4.block
import pytest

from bench import hits, memory, policies, poolalone, poolhit, secondpass
from bench.models.classic import lru_over_fifo
from bench.models.replay import PAGES_A_SLAB, Sizes, replay_engine, replay_policy
from bench.tools import content, fio, harness, pages, procmem, report, traces
from bench.tools.children import BenchError, run
from bench.tools.harness import mounts_under
from bench.tools.verdict import Verdict
from tests.bench.interrupting import interrupt

MIB = content.MIB


def write_trace(directory: Path, name: str, requests: int) -> Path:
    """Write a skewed trace of at most 400 pages in the LIRS format."""
    import gzip

    source = random.Random(4)
    numbers = [int(400 * source.random() ** 3) for _ in range(requests)]
    path = directory / f"{name}.trace.gz"
    with gzip.open(path, "wt") as file:
        file.write("*\n".join(f"{number}\n" for number in numbers))
    return path


def test_half_compressible_pages_are_seeded_and_fit_half_a_page(tmp_path: Path) -> None:
    content.write_half_compressible(tmp_path / "one", 20, seed=3)
    content.write_half_compressible(tmp_path / "two", 20, seed=3)
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    cut = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    assert len(set(cut)) == 20
    assert all(1900 < len(lz4.block.compress(page, store_size=False)) <= 2048 for page in cut)


def test_a_lirs_trace_is_read_without_its_breaks(tmp_path: Path) -> None:
    path = write_trace(tmp_path, "small", 50)
    assert len(traces.read(path)) == 50
    assert traces.read(path, limit=7) == traces.read(path)[:7]
    assert traces.title(path) == "small"


def test_an_arc_trace_names_runs_of_blocks_and_p3_has_eight_blocks_a_page(tmp_path: Path) -> None:
    for name in ("OLTP", "P3"):
        (tmp_path / f"{name}.lis").write_text("16 3 0 0\n7 2 0 1\n")
    assert list(traces.read(tmp_path / "OLTP.lis")) == [16, 17, 18, 7, 8]
    assert list(traces.read(tmp_path / "P3.lis")) == [2, 0, 1]
    assert [path.name for path in traces.names(tmp_path)] == ["OLTP.lis", "P3.lis"]


def test_a_zstd_trace_is_decompressed(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("5 1 0 0\n")
    try:
        run(["zstd", "-q", tmp_path / "plain", "-o", tmp_path / "OLTP.lis.zst"], seconds=60)
    except BenchError as error:
        pytest.skip(f"the zstd program: {error}")
    assert list(traces.read(tmp_path / "OLTP.lis.zst")) == [5]


def test_the_pool_of_a_replay_is_whole_slabs() -> None:
    sizes = Sizes.of(1000, 0.05, 0.10)
    assert sizes == Sizes(50, 6 * PAGES_A_SLAB)
    assert Sizes.of(10, 0.01, 0.02) == Sizes(1, PAGES_A_SLAB)


def test_all_replays_miss_each_page_once_when_everything_fits() -> None:
    trace = [number % 60 for number in range(600)]
    assert replay_engine(trace, Sizes(32, 64)) == replay_policy(trace, 96) == lru_over_fifo(trace, 32, 64) == 60


def test_all_replays_miss_always_in_a_scan() -> None:
    trace = range(1200)
    assert replay_engine(trace, Sizes(16, 16)) == replay_policy(trace, 32) == lru_over_fifo(trace, 16, 16) == 1200


def test_the_engine_keeps_a_part_of_a_loop_that_is_too_long() -> None:
    trace = [number % 120 for number in range(2400)]
    engine, alone = replay_engine(trace, Sizes(36, 64)), replay_policy(trace, 100)
    assert lru_over_fifo(trace, 36, 64) == 2400
    assert engine == pytest.approx(alone, rel=0.2)
    assert alone < 1200


def test_back_and_forth_turns_at_both_ends_without_a_repetition() -> None:
    assert list(policies.back_and_forth(4, 3)) == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]


def test_the_pages_of_a_phase_are_its_own(tmp_path: Path) -> None:
    for name in ("lirs_multi2", "lirs_sprite", "lirs_2_pools"):
        write_trace(tmp_path, name, 200)
    found = {case.name: case for case in policies.cases(traces.names(tmp_path)) if case.group == policies.PHASES}
    assert set(found) == {"lirs_sprite + lirs_2_pools", "lirs_multi2 + loop"}
    result = policies.replay(policies.Task(found["lirs_sprite + lirs_2_pools"], (0.1, 0.2), 0))
    assert result.requests == 400
    assert result.footprint == 2 * len(set(traces.read(tmp_path / "lirs_sprite.trace.gz")))
    loop = policies.replay(policies.Task(found["lirs_multi2 + loop"], (0.1, 0.2), 0))
    assert loop.requests == 200 + 25 * (loop.sizes.pages * 4 // 5)


def test_the_baseline_counts_as_by_hand() -> None:
    # Cache 1, pool 1: 1 and 2 miss; 1 comes from the pool; 3 misses and pushes 1, then 2 is gone.
    assert lru_over_fifo([1, 2, 1, 3, 2], 1, 1) == 4


def test_policies_report_every_replay_and_the_change_of_their_misses(tmp_path: Path) -> None:
    write_trace(tmp_path, "one", 1500)
    write_trace(tmp_path, "two", 900)
    outcome = policies.measure(tmp_path, limit=1500)
    figures = outcome.figures
    assert set(figures["traces"]) == {"one", "two"}
    assert len(figures["replays"]) == 3 * len(policies.SHARES), "two traces, and back and forth"
    assert set(figures["groups"]) == {policies.TRACES, policies.BACK_AND_FORTH}
    assert set(figures["policies"]) == {"ours", "policy alone", "LRU + FIFO", "LRU", "FIFO", "S3-FIFO", "Belady"}
    for replay in figures["replays"]:
        assert replay["policies"]["Belady"] <= min(replay["policies"].values())
        assert replay["distinct_pages"] <= replay["misses"] <= replay["requests"]
        assert replay["pool_pages"] % PAGES_A_SLAB == 0
    assert figures["mean"] == pytest.approx(sum(figures["traces"].values()) / 2)
    counted = [goal for goal in outcome.goals if not goal.what.startswith(policies.PHASES)]
    assert all(goal.verdict in ("met", "missed") for goal in counted), "what is counted is judged"
    assert policies.measure(tmp_path, limit=1500).figures == figures


def test_policies_without_traces_say_that_they_are_skipped(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "missing"):
        outcome = policies.measure(directory)
        assert "skipped" in outcome.figures
        assert all(goal.verdict == "reported" and goal.result.startswith("skipped") for goal in outcome.goals)


def test_fio_output_is_read_past_its_warnings() -> None:
    side = {
        "iops": 10.5,
        "bw_bytes": 43008,
        "clat_ns": {"percentile": {"50.000000": 80000, "99.000000": 900000}},
        "total_ios": 21,
        "runtime": 2000,
    }
    output = b"fio: a warning\n" + json.dumps({"jobs": [{"error": 0, "read": side}]}).encode()
    assert fio.parse(output) == fio.Reads(10.5, 43008, 80e-6, 900e-6, 21, 2.0)
    with pytest.raises(BenchError, match="error 5"):
        fio.parse(json.dumps({"jobs": [{"error": 5, "read": side}]}).encode())


def test_a_goal_renders_as_a_line_and_as_a_row_of_the_table() -> None:
    goal = report.Goal("reads", "≥ 2×", "1×", Verdict.MISSED)
    assert goal.line() == "reads: 1× (goal ≥ 2×): missed"
    assert goal.row() == "| reads | ≥ 2× | 1× | missed |"
    assert report.Goal("reads", "–", "1×").line() == "reads: 1×"
    assert report.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_the_memory_of_a_process_counts_a_memfd_that_it_does_not_map() -> None:
    before = procmem.of(os.getpid())
    fd = os.memfd_create("tmem-arena")
    try:
        os.posix_fallocate(fd, 0, 8 * MIB)
        after = procmem.of(os.getpid())
    finally:
        os.close(fd)
    assert after.memfd - before.memfd == 8 * MIB


def test_the_kernels_page_cache_of_a_file_is_told_without_touching_it(tmp_path: Path) -> None:
    fd = os.memfd_create("file")
    try:
        os.truncate(fd, 64 * 4096)
        os.pwrite(fd, bytes(3 * 4096), 5 * 4096)
        assert procmem.in_page_cache(fd, 64 * 4096, touch=False) == 3 * 4096
        assert procmem.in_page_cache(fd, 64 * 4096, touch=True) == 64 * 4096
    finally:
        os.close(fd)


def test_a_command_that_hangs_is_ended_in_bounded_time() -> None:
    began = time.monotonic()
    with pytest.raises(BenchError, match="did not end within"):
        run(["sleep", "60"], seconds=0.2)
    assert time.monotonic() - began < 50


def test_a_mount_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="missing"),
        harness.tmemfs(tmp_path / "missing", tmp_path / "mount", cache=4 * MIB, pool=0),
    ):
        pass
    assert not harness.is_mounted(tmp_path / "mount")


def test_poolalone_compares_installed_stores_and_reports_growth() -> None:
    figures = poolalone.measure(count=200, rounds=1, max_pages=10_000).figures
    assert "tmem pool" in figures["stores"]
    assert set(figures["stores"]) | set(figures["skipped_stores"]) == {
        "tmem pool",
        "zram",
        "redis",
        "memcached",
    }
    assert all(found["puts_a_second"] > 0 < found["gets_a_second"] for found in figures["stores"].values())
    assert [found["pages"] for found in figures["growth"]] == [10_000]
    assert len(figures["bare"]["put"]) == len(figures["growth"][0]["parts"]["put"]) == 1


@pytest.mark.mount
def test_the_null_filesystem_answers_alike_by_view_and_by_bytes(tmp_path: Path) -> None:
    with harness.nullfs(tmp_path / "null", 100_000) as null:
        view, copied = ((null.path / name).read_bytes() for name in ("view", "bytes"))
        assert len(view) == 100_000
        assert view == copied
        assert sorted(os.listdir(null.path)) == ["bytes", "view"]
    assert not harness.is_mounted(tmp_path / "null")


@pytest.mark.mount
def test_hits_compare_with_the_stronger_null(require_fio: None) -> None:
    outcome = hits.measure(pairs=2, seconds=0.3, size=2 * MIB)
    assert [goal.verdict for goal in outcome.goals] == ["not decided", "reported"] * 2, "two rounds are few"
    for figures in outcome.figures.values():
        assert figures["stronger_null"] in ("null view", "null bytes")
        assert all(len(values) == 2 for values in figures["values"].values())
        assert len(figures["ratios"]["ordered"]) == 2


@pytest.mark.mount
def test_pool_hits_come_from_the_pool_and_cache_hits_from_the_cache() -> None:
    outcome = poolhit.measure(pairs=2, size=4 * MIB)
    for found in outcome.figures["rounds"]:
        for block in poolhit.BLOCKS:
            counted = found[block]["counted"]
            assert counted["pool"]["backing_reads"] == counted["cache"]["backing_reads"] == 0
            # The kernel may cut a read of 1 MiB within a page, which then counts twice.
            assert 1024 <= counted["cache"]["cache_hits"] <= 1024 + 4
            assert counted["pool"]["precache_succ_gets"] + counted["pool"]["precache_reads"] > 512


@pytest.mark.mount
def test_the_second_pass_is_reported_for_both_orders() -> None:
    outcome = secondpass.measure(rounds=1, cache=MIB, large=2 * MIB, latency="1ms")
    assert set(outcome.figures) == {"random", "sequential"}
    (found,) = outcome.figures["random"]["rounds"]
    assert found["ratio"] == pytest.approx(found["first_seconds"] / found["second_seconds"])
    assert set(found["second_pass"]) >= {"backing_pages", "precache_dropped"}


@pytest.mark.mount
def test_memory_is_reported_full_and_after_a_resize() -> None:
    outcome = memory.measure(8 * MIB, 8 * MIB, 32 * MIB, 4 * MIB)
    full, resize = outcome.figures["full"], outcome.figures["resize"]
    assert full["full"]["memfd_bytes"] == 8 * MIB
    assert full["full"]["total_bytes"] > full["idle"]["total_bytes"]
    slabs, whole = full["honesty"].values()
    assert slabs["measured"] == slabs["counters"] == 8 * MIB
    assert whole["measured"] > 8 * MIB
    assert 0 < full["mapped_bytes"] <= 8 * MIB, "how much of it stays is the kernel's choice"
    assert resize["fall_bytes"] == resize["before"]["total_bytes"] - resize["after"]["total_bytes"]


@pytest.mark.mount
def test_a_mount_at_a_path_that_is_no_text_is_found_and_hides_no_other(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"not \xfe text\rnor one line")
    with harness.nullfs(odd, 4096), harness.nullfs(tmp_path / "null", 4096) as null:
        assert harness.is_mounted(odd)
        assert harness.is_mounted(null.path)
        assert set(mounts_under(tmp_path)) == {odd, null.path}
    assert mounts_under(tmp_path) == []


@pytest.mark.mount
def test_every_page_is_read_once_in_either_way(tmp_path: Path) -> None:
    content.write_random(tmp_path / "file", 10 * 4096)
    assert pages.in_order(tmp_path / "file", content.shuffled(10, seed=1)).pages == 10
    assert pages.sequentially(tmp_path / "file", block=3 * 4096).pages == 10


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_leaves_no_mount_and_no_files(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "bench.poolhit", "--pairs", "500", "--size", "4"]
    interrupt(command, tmp_path, number)


@pytest.fixture
def require_fio() -> None:
    """Skip where fio is missing."""
    try:
        run(["fio", "--version"], seconds=60)
    except BenchError as error:
        pytest.skip(f"fio: {error}")
