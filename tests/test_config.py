"""Sizes, durations, throttles, pools and -o options: accepted and refused values."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemcommon.sizes import MIB, ConfigError, parse_duration, parse_size
from tmemfs.config import MountConfig, PoolChoice, Throttle, parse_balloon, parse_pool, parse_throttle
from tmemfs.options import MS_NOATIME, MS_NODEV, MS_NOSUID, MS_RDONLY, parse_options
from tmemfs.statefiles import mount_name

PLAIN = MountConfig(Path("/source"), Path("/mnt"))
RAM = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("64M", 64 * MIB),
        ("64MiB", 64 * MIB),
        ("64Mi", 64 * MIB),
        ("1.5G", 1536 * MIB),
        (" 1 G ", 1024 * MIB),
        ("1T", 1 << 40),
        ("100%", RAM),
        ("10%", RAM // 10),
    ],
)
def test_a_size_is_a_number_with_a_binary_unit_or_a_share_of_ram(text: str, size: int) -> None:
    assert abs(parse_size(text) - size) <= 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0M",
        "0%",
        "-1",
        "12Q",
        "500%",
        "100.1%",
        "M",
        "1 2",
        "0x10",
        "1e3",
        "inf",
        "9999999999T",
        "٣",
    ],
)
def test_an_invalid_size_is_refused_in_one_line_that_names_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert f"'{text}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_parsers_raise_only_config_errors(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_throttle, parse_pool, lambda word: parse_options([word])):
        with contextlib.suppress(ConfigError):
            parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5ms", 0.005), ("0", 0), ("0.5", 0.5), ("2s", 2), ("100us", 1e-4), ("1m", 60), ("1h", 3600)]
)
def test_a_duration_is_in_seconds_unless_it_has_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "5 parsecs", "ms", "nan", "9" * 400, "300000h"])
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="duration"):
        parse_duration(text)


def test_a_throttle_has_three_parts_and_each_may_be_left_out() -> None:
    assert parse_throttle("latency=5ms,bandwidth=100M,depth=8") == Throttle(0.005, 100 * MIB, 8)
    assert parse_throttle("latency=5ms") == Throttle(0.005, 0, 32)


@pytest.mark.parametrize(
    "text", ["", "latency", "latency=", "depth=0", "depth=-1", "depth=x", "speed=1", "bandwidth=0"]
)
def test_an_invalid_throttle_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_throttle(text)


def test_a_pool_is_a_size_or_none_or_a_socket() -> None:
    assert parse_pool("256M") == PoolChoice(256 * MIB)
    assert parse_pool("none") == PoolChoice(0)
    assert parse_pool("unix:/run/tmemd.sock") == PoolChoice(RAM, "/run/tmemd.sock")


def test_a_cache_under_one_mib_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1M"):
        replace(PLAIN, cache_bytes=MIB - 1)


def test_a_pool_under_one_slab_is_refused_and_none_is_not() -> None:
    with pytest.raises(ConfigError, match="at least 64K"):
        replace(PLAIN, pool_bytes=65535)
    assert replace(PLAIN, pool_bytes=0).pool_bytes == 0


@pytest.mark.parametrize(
    "beyond",
    [
        {"cache_bytes": RAM + 1},
        {"pool_bytes": RAM + 1},
        {"pool_bytes": RAM + 1, "pool_socket": "/run/tmemd.sock"},
        {"balloon": parse_balloon(f"min=1M,max={RAM + 1}")},
    ],
    ids=["cache", "pool", "borrowed pool", "balloon"],
)
def test_more_memory_than_the_machine_has_is_refused(beyond: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="more than all RAM: give at most"):
        replace(PLAIN, **beyond)
    assert replace(PLAIN, cache_bytes=RAM, pool_bytes=RAM).cache_bytes == RAM


def test_each_mountpoint_has_a_file_name_of_its_own() -> None:
    names = {
        "/": "-",
        "/data": "data",
        "/x/a/b": "x-a-b",
        "/x/a-b": "x-a\\x2db",
        "/x/a\\x2db": "x-a\\x5cx2db",
        "/.x": "\\x2ex",
        "/\udcff ö": "\\xff\\x20\\xc3\\xb6",
    }
    assert {path: mount_name(Path(path)) for path in names} == names
    long = [mount_name(Path("/" + "/".join([end, *["d" * 100] * 9]))) for end in ("a", "b")]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 240, "a file name has room for a longer suffix"


@pytest.mark.parametrize("path", ["", "/run/" + "s" * 103])
def test_an_invalid_socket_path_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(ConfigError, match="unix:"):
        replace(PLAIN, pool_socket=path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "n" * 256])
def test_an_invalid_control_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="control name"):
        replace(PLAIN, control_name=name)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_an_invalid_timeout_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--attr-timeout"):
        replace(PLAIN, attr_timeout=seconds)


def test_options_default_to_safe_and_the_last_value_wins() -> None:
    assert parse_options([]).flags == MS_NOSUID | MS_NODEV
    options = parse_options(["ro,noatime", "suid,dev,rw,allow_other,fsname=here"])
    assert options.flags == MS_NOATIME
    assert options.allow_other
    assert options.fsname == "here"
    assert parse_options(["rw,ro"]).flags & MS_RDONLY


def test_options_of_fstab_are_accepted_and_ignored() -> None:
    assert parse_options(["defaults,_netdev,nofail,x-systemd.automount"]) == parse_options([])


@pytest.mark.parametrize("text", ["bogus", "ro,bogus", "fsname=", "fsname", "subtype=other", "bogus=1"])
def test_an_unknown_option_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"'{text.rpartition(',')[2]}'"):
        parse_options([text])


def test_allow_root_is_allow_other_for_the_kernel_and_a_rule_for_libfuse() -> None:
    options = parse_options(["allow_root"])
    assert "allow_other" in options.kernel_data(5, 0, 0)
    assert options.libfuse_words() == {"allow_root"}
    assert "allow_other" not in options.plain_words("name")
    with pytest.raises(ConfigError, match="exclude"):
        parse_options(["allow_root,allow_other"])


def test_a_comma_in_the_name_of_the_filesystem_is_escaped_for_fusermount() -> None:
    assert "fsname=a\\,b\\\\c" in parse_options([]).words("a,b\\c")
