"""The virtual files: found, not listed, consistent, unchanged by invalid input."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import pytest

from tests.calls import code_of
from tests.conftest import wait_until
from tests.mounted import VARIANTS, Mounted, shell
from tests.pagebytes import pages_of, pages_touched

pytestmark = pytest.mark.mount
Options = tuple[str, ...]
PAGE = 4096
CONTRACT = [
    "cache_capacity_bytes",
    "cache_resident_bytes",
    "cache_dirty_bytes",
    "cache_hits",
    "cache_misses",
    "cache_evictions",
    "cache_waits",
    "cache_hit_ratio",
    "precache_puts",
    "precache_rejected_puts",
    "precache_succ_gets",
    "precache_reads",
    "precache_failed_gets",
    "precache_flushes",
    "precache_dropped",
    "precache_hit_ratio",
    "pool_slabs",
    "pool_lent_bytes",
    "pool_used_bytes",
    "pool_pages",
    "pool_original_bytes",
    "pool_compressed_bytes",
    "pool_compression_ratio",
    "pool_same_filled_pages",
    "pool_raw_pages",
    "pool_evictions",
    "pool_revoked_slabs",
    "pool_index_bytes",
    "pool_ghost_hits",
    "hswap_puts",
    "hswap_rejected_puts",
    "hswap_gets",
    "hswap_flushes",
    "hswap_pool_pages",
    "hswap_overflow_pages",
    "backing_reads",
    "backing_pages",
    "readahead_pages",
    "readahead_hits",
    "readahead_unused",
    "demand_pages",
    "demand_hits",
    "demand_misses",
    "backing_read_bytes",
    "backing_writes",
    "backing_write_bytes",
    "backing_errors",
    "backing_read_seconds",
    "hit_ratio",
    "request_read_count",
    "request_read_p50_seconds",
    "request_read_p99_seconds",
    "request_read_p999_seconds",
]


def test_control_files_are_found_and_not_listed(mounted: Mounted) -> None:
    (mounted.source / "f").write_text("x")
    root = mounted.start()
    assert os.listdir(root) == ["f"]
    assert os.listdir(root / ".tmemfs") == []
    for name in (
        "stats",
        ".tmemfs/stats",
        ".tmemfs/stats.json",
        ".tmemfs/metrics",
        ".tmemfs/config",
        ".tmemfs/cache_size",
    ):
        assert (root / name).read_bytes(), name
        assert (root / name).is_file()
    shell('diff -r . "$OTHER"', root, OTHER=mounted.source)
    assert shell("find . | sort", root) == ".\n./f\n"


def test_stats_are_aligned_lines_that_agree_with_json_and_metrics(mounted: Mounted) -> None:
    (mounted.source / "f").write_bytes(pages_of(1, 600))
    root = mounted.start()
    assert "cache_hit_ratio" in (root / "stats").read_text()
    values = mounted.stats()
    assert values["cache_hit_ratio"] is None, "a ratio with denominator zero"
    line = next(line for line in (root / "stats").read_text().splitlines() if line.startswith("cache_hit_ratio"))
    assert line.split() == ["cache_hit_ratio", "-"]
    (root / "f").read_bytes()
    (root / "f").read_bytes()
    lines = (root / "stats").read_text().splitlines()
    assert len({len(line) - len(line.split()[-1]) for line in lines if len(line.split()) == 2}) == 1
    text = dict(line.split(maxsplit=1) for line in lines)
    values = mounted.stats()
    assert not [name for name in CONTRACT if name not in values]
    # The engine moves pages into the pool between the two reads.
    still = ("cache_capacity_bytes", "cache_hits", "cache_misses", "cache_waits", "precache_succ_gets", "backing_pages")
    for name in still:
        if isinstance(values[name], int):
            assert text[name] == str(values[name]), name
    metrics = (root / ".tmemfs" / "metrics").read_text()
    assert f"tmemfs_cache_hits {values['cache_hits']}\n" in metrics
    assert "# TYPE tmemfs_cache_hits counter\n" in metrics
    assert "# TYPE tmemfs_cache_resident_bytes gauge\n" in metrics


def test_each_open_of_stats_is_one_snapshot(mounted: Mounted) -> None:
    (mounted.source / "f").write_bytes(pages_of(1, 600))
    root = mounted.start()
    with (root / ".tmemfs" / "stats.json").open("rb", buffering=0) as file:
        first = os.pread(file.fileno(), 50, 0)
        (root / "f").read_bytes()
        rest = os.pread(file.fileno(), 1 << 20, 50)
        assert json.loads(first + rest)["backing_pages"] == 0


def test_a_file_of_the_backing_named_stats_takes_precedence(mounted: Mounted, variant: Options) -> None:
    root = mounted.start(*variant)
    assert b"cache_hits" in (root / "stats").read_bytes()
    (mounted.source / "stats").write_text("mine")
    assert (root / "stats").read_text() == "mine"
    assert os.listdir(root) == ["stats"]
    assert b"cache_hits" in (root / ".tmemfs" / "stats").read_bytes()
    (root / "stats").unlink()
    assert b"cache_hits" in (root / "stats").read_bytes()
    assert not (mounted.source / "stats").exists()


def test_below_the_root_stats_is_a_name_like_any_other(mounted: Mounted) -> None:
    root = mounted.start()
    (root / "d").mkdir()
    assert not (root / "d" / "stats").exists()
    assert not (root / "d" / ".tmemfs").exists()
    (root / "d" / "stats").write_text("mine")
    assert (mounted.source / "d" / "stats").read_text() == "mine"


def test_the_control_directory_can_have_another_name(mounted: Mounted) -> None:
    (mounted.source / ".tmemfs").mkdir()
    (mounted.source / ".tmemfs" / "stats").write_text("mine")
    root = mounted.start("--control-name", ".ctl")
    assert (root / ".tmemfs" / "stats").read_text() == "mine"
    assert b"cache_hits" in (root / ".ctl" / "stats").read_bytes()


def test_the_virtual_files_cannot_be_changed_like_files(mounted: Mounted) -> None:
    root = mounted.start()
    control = root / ".tmemfs"
    for call in (
        lambda: os.unlink(control / "stats"),
        lambda: os.mkdir(control / "d"),
        lambda: os.rename(control / "stats", root / "x"),
        lambda: os.open(control / "x", os.O_CREAT | os.O_WRONLY),
        lambda: os.open(control / "metrics", os.O_WRONLY),
        lambda: os.open(control / "drop_caches", os.O_RDONLY),
        lambda: os.link(control / "stats", root / "x"),
        lambda: os.rmdir(control),
        lambda: os.setxattr(control / "stats", "user.x", b""),
    ):
        assert code_of(call) != "none"
    assert os.listdir(mounted.source) == []
    assert (control / "stats").read_bytes()


def test_cache_size_resizes_while_it_runs(mounted: Mounted, writing: Options) -> None:
    data = pages_of(1, 1500)
    (mounted.source / "f").write_bytes(data)
    root = mounted.start(*writing)
    for size in ("4M", "1M", "16M", "2M", "1048576\n"):
        mounted.control("cache_size", size)
        assert (root / "f").read_bytes() == data
        stats = mounted.stats()
        assert stats["cache_resident_bytes"] <= stats["cache_capacity_bytes"]
    assert (root / ".tmemfs" / "cache_size").read_text() == "1048576\n"


def test_a_shrink_that_dirty_pages_block_writes_them_back(mounted: Mounted) -> None:
    root = mounted.start("--writeback")
    mounted.control("cache_size", "16M")
    data = pages_of(1, 800)
    fd = os.open(root / "f", os.O_CREAT | os.O_RDWR)

    def is_dirty() -> bool:  # on a busy machine it may already be written back by age
        os.pwrite(fd, data, 0)
        return bool(mounted.stats()["cache_dirty_bytes"] == len(data))

    wait_until(is_dirty, "everything is dirty")
    mounted.control("cache_size", "1M")
    stats = mounted.stats()
    assert stats["cache_resident_bytes"] <= stats["cache_capacity_bytes"] == 1 << 20
    assert os.pread(fd, len(data), 0) == data
    os.close(fd)


def test_no_directory_is_hidden_behind_the_control_directory(mounted: Mounted) -> None:
    root = mounted.start()
    (root / "d").mkdir()
    with pytest.raises(PermissionError):
        (root / "d").rename(root / ".tmemfs")
    assert os.listdir(root) == ["d"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        *(
            ("cache_size", line)
            for line in ("0", "-1", "12Q", "500%", "64K", "1023K", "", "\n", "lots", "1e9", "\xff", "999999T")
        ),
        *(("drop_caches", line) for line in ("missing", "/f/below", "..", "../outside", "f/..", "a\0b", "x" * 300)),
        *(("stats", line) for line in ("", "clear", "reset now")),
        *(("freeze", line) for line in ("2", "on", "-1", "10")),
    ],
)
def test_bad_input_is_invalid_and_changes_nothing(mounted: Mounted, name: str, line: str) -> None:
    (mounted.source / "f").write_bytes(pages_of(1, 100))
    root = mounted.start()
    (root / "f").read_bytes()
    before = mounted.stats()
    if not line:
        return  # an empty write does not reach the filesystem
    assert code_of(lambda: mounted.control(name, line)) == "EINVAL"
    after = mounted.stats()
    for counter in ("cache_capacity_bytes", "cache_resident_bytes", "backing_pages"):
        assert after[counter] == before[counter]
    assert "Traceback" not in mounted.log()


def test_drop_caches_drops_everything_or_one_file(mounted: Mounted, writing: Options) -> None:
    (mounted.source / "d").mkdir()
    for name in ("a", "d/b"):
        (mounted.source / name).write_bytes(pages_of(len(name), 200))
    root = mounted.start(*writing)
    mounted.control("cache_size", "4M")

    def backing_pages_of_reading(name: str) -> int:
        before: int = mounted.stats()["backing_pages"]
        assert (root / name).read_bytes() == (mounted.source / name).read_bytes()
        return int(mounted.stats()["backing_pages"]) - before

    assert backing_pages_of_reading("a") == backing_pages_of_reading("d/b") == 200
    assert backing_pages_of_reading("a") == backing_pages_of_reading("d/b") == 0
    mounted.control("drop_caches", "d/b\n")
    assert (backing_pages_of_reading("a"), backing_pages_of_reading("d/b")) == (0, 200)
    mounted.control("drop_caches", "1\n")
    assert mounted.stats()["cache_resident_bytes"] == mounted.stats()["pool_pages"] == 0
    assert (backing_pages_of_reading("a"), backing_pages_of_reading("d/b")) == (200, 200)


def test_a_drop_keeps_dirty_pages(mounted: Mounted) -> None:
    root = mounted.start("--writeback")
    fd = os.open(root / "f", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"dirty", 100)
    mounted.control("drop_caches", "1")
    assert os.pread(fd, 200, 0) == bytes(100) + b"dirty"
    os.close(fd)
    assert (mounted.source / "f").read_bytes() == bytes(100) + b"dirty"


def test_a_reset_starts_the_counters_at_zero(mounted: Mounted) -> None:
    (mounted.source / "f").write_bytes(pages_of(1, 100))
    root = mounted.start()
    (root / "f").read_bytes()
    assert mounted.stats()["backing_pages"] == 100
    mounted.control("stats", "reset\n")
    after = mounted.stats()
    assert after["backing_pages"] == after["cache_hits"] == after["cache_misses"] == 0
    assert after["cache_resident_bytes"] == 100 * PAGE


@pytest.mark.parametrize("name", ["through", "threads", "nopool"])
@pytest.mark.parametrize("seed", range(2))
def test_counters_reconcile_exactly(mounted: Mounted, name: str, seed: int) -> None:
    """Pages requested = demand_pages = demand_hits + readahead_hits + demand_misses."""
    generator = random.Random(seed)
    size = 900 * PAGE + 123
    data = pages_of(seed, 901)[:size]
    (mounted.source / "f").write_bytes(data)
    root = mounted.start(*VARIANTS[name])
    requested = 0
    children = 3
    plan = [
        (generator.randrange(size), generator.choice([1, 100, PAGE, 9000, 131_072]))
        if generator.random() < 0.5
        else (number * 65_536 % size, 65_536)
        for number in range(400)
    ]
    program = (
        "import os, sys\nfd = os.open('f', os.O_RDONLY)\n"
        "for line in sys.argv[1].split(';'):\n    at, n = map(int, line.split(','))\n"
        "    os.pread(fd, n, at)\n"
    )
    share = ["" for _ in range(children)]
    for number, (offset, count) in enumerate(plan):
        count = min(count, size - offset)
        requested += pages_touched(offset, count)
        mine = number % children
        share[mine] += f"{';' if share[mine] else ''}{offset},{count}"
    variables: dict[str, Any] = {f"PLAN{number}": plan_text for number, plan_text in enumerate(share)}
    starts = "".join(f'python3 -c "$CODE" "$PLAN{number}" & ' for number in range(children))
    shell(f"{starts} for j in $(jobs -p); do wait $j; done", root, 100.0, CODE=program, **variables)
    now = mounted.stats()
    assert requested == now["demand_pages"] == now["demand_hits"] + now["readahead_hits"] + now["demand_misses"]
    assert requested == now["cache_hits"] + now["readahead_hits"] + now["cache_misses"]
    assert now["demand_hits"] == now["cache_hits"] + now["precache_succ_gets"] + now["precache_reads"]
    assert now["demand_misses"] == now["cache_waits"] + now["backing_pages"] - now["readahead_pages"]
    assert now["readahead_hits"] + now["readahead_unused"] <= now["readahead_pages"]


def test_a_first_scan_misses_and_a_second_one_hits(mounted: Mounted) -> None:
    (mounted.source / "f").write_bytes(pages_of(1, 200))
    root = mounted.start("--throttle", "latency=1ms")
    for ratio in (0.0, 1.0):
        mounted.control("stats", "reset\n")
        with (root / "f").open("rb", buffering=0) as file:
            while file.read(PAGE):
                pass
        now = mounted.stats()
        assert now["demand_pages"] == 200
        assert now["hit_ratio"] == now["cache_hit_ratio"] == ratio, now


def test_throttle_is_obeyed(mounted: Mounted) -> None:
    data = pages_of(1, 256)
    (mounted.source / "f").write_bytes(data)
    root = mounted.start("--throttle", "latency=40ms,bandwidth=4M")
    fd = os.open(root / "f", os.O_RDONLY)
    began = time.monotonic()
    for page in (200, 100, 150, 50, 10):
        assert os.pread(fd, PAGE, page * PAGE) == data[page * PAGE : (page + 1) * PAGE]
    assert time.monotonic() - began >= 5 * 0.040
    reads = mounted.stats()["backing_reads"]
    for page in (200, 100, 150, 50, 10):
        os.pread(fd, PAGE, page * PAGE)
    assert mounted.stats()["backing_reads"] == reads, "hits are not throttled"
    began = time.monotonic()
    assert os.pread(fd, len(data), 0) == data
    assert time.monotonic() - began >= (len(data) - 6 * PAGE) / (4 << 20)
    os.close(fd)
