"""The commands on a real mount. Bad input gives one line and exit code 2, and mounts nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import REAL, Place, has_ended, run
from tmemfs.cli import cli


def refused(place: Place, *words: str | Path, code: int = 2) -> str:
    """Run a command that must fail in one line; return the line."""
    done = run(*REAL, *words)
    assert done.returncode == code, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tmemfs: ")
    assert done.stdout == ""
    assert not place.is_mounted()
    return lines[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--cache", "0"], "'0'"),
        (["--cache", "-1"], "'-1'"),
        (["--cache", "12Q"], "'12Q'"),
        (["--cache", "500%"], "'500%'"),
        (["--cache", "1023K"], "at least 1M"),
        (["--cache", "900T"], "more than all RAM"),
        (["--pool", "900T"], "more than all RAM"),
        (["--balloon", "min=1M,max=900T"], "more than all RAM"),
        (["--pool", "0"], "'0'"),
        (["--pool", "63K"], "at least 64K"),
        (["--pool", "unix:/run/none"], "unix:/run/none"),
        (["-o", "bogus"], "'bogus'"),
        (["--bogus"], "--bogus"),
        (["--throttle", "speed=1"], "speed=1"),
        (["--version-by", "luck"], "luck"),
        (["--backing-cache", "maybe"], "maybe"),
        (["--attr-timeout", "soon"], "soon"),
        (["--control-name", "a/b"], "a/b"),
        (["--log", "/nowhere/log"], "/nowhere/log"),
        (["surplus"], "surplus"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_mounted(place: Place, options: list[str], named: str) -> None:
    assert named in refused(place, "mount", place.source, place.mountpoint, "--log", place.log, *options)


def test_a_missing_source_is_named(place: Place) -> None:
    assert "none' does not exist" in refused(place, "mount", place.source / "none", place.mountpoint)


def test_a_source_that_is_a_file_is_named(place: Place) -> None:
    (place.source / "file").touch()
    assert "not a directory" in refused(place, "mount", place.source / "file", place.mountpoint)


def test_a_missing_mountpoint_is_named(place: Place) -> None:
    assert "mkdir" in refused(place, "mount", place.source, place.mountpoint / "none")


def test_a_mountpoint_that_is_a_file_is_named(place: Place) -> None:
    (place.mountpoint / "file").touch()
    assert "not a directory" in refused(place, "mount", place.source, place.mountpoint / "file")


def test_a_mountpoint_inside_source_is_refused(place: Place) -> None:
    (place.source / "inside").mkdir()
    assert "lies inside" in refused(place, "mount", place.source, place.source / "inside")


@pytest.mark.parametrize("words", [["umount"], ["stats"], ["resize"], ["drop"], ["warm"]])
def test_a_command_on_a_directory_that_is_no_mount_says_so(place: Place, words: list[str]) -> None:
    extra = {"resize": ["64M"], "warm": ["."]}.get(words[0], [])
    assert "not a tmemfs mount" in refused(place, *words, place.mountpoint, *extra)


def test_no_arguments_and_unknown_commands_are_usage_errors(place: Place) -> None:
    assert "'SOURCE': see tmemfs mount --help" in refused(place, "mount")
    assert "bogus" in refused(place, "bogus")
    assert run(*REAL).returncode == 2
    assert run(*REAL, "--help").returncode == 0


@pytest.mark.mount
def test_the_commands_work_on_a_mount_from_start_to_end(place: Place) -> None:
    (place.source / "file").write_bytes(os.urandom(1 << 20))
    (place.source / "dir").mkdir()
    (place.source / "dir" / "other").write_bytes(b"x" * 5000)
    done = place.mount("--cache", "16M", "--pool", "32M")
    assert done.returncode == 0, done
    assert f"log {place.log}" in done.stderr

    compared = run("diff", "-r", place.source, place.mountpoint)
    assert compared.returncode == 0, compared

    def stats(*options: str) -> dict[str, object]:
        done = run(*REAL, "stats", place.mountpoint, "--json", *options)
        assert done.returncode == 0, done
        counters: dict[str, object] = json.loads(done.stdout)
        return counters

    assert stats()["cache_capacity_bytes"] == 16 << 20
    assert "cache_hits" in run(*REAL, "stats", place.mountpoint).stdout
    commands: list[list[str | Path]] = [
        ["resize", place.mountpoint, "8M"],
        ["drop", place.mountpoint],
        ["stats", place.mountpoint, "--reset"],
    ]
    for words in commands:
        done = run(*REAL, *words)
        assert done.returncode == 0, done
    after = stats()
    assert after["cache_capacity_bytes"] == 8 << 20
    assert after["cache_resident_bytes"] == 0

    def within(*words: str) -> subprocess.CompletedProcess[str]:
        """Run a command with `dir` of the mount as the working directory."""
        return run("sh", "-c", 'cd "$0" && exec "$@"', place.mountpoint / "dir", *REAL, *words)

    done = within("warm", "..", "../file", os.fspath(place.mountpoint / "dir"))
    assert done.returncode == 0, done
    assert "read 1.0M, of which 1.0M are in memory now (100 %)" in done.stderr
    assert stats()["cache_resident_bytes"] == (1 << 20) + 8192
    done = within("drop", "..", "../file")
    assert done.returncode == 0, done
    assert stats()["cache_resident_bytes"] == 8192
    (place.mountpoint / "link").symlink_to("dir/other")
    assert run(*REAL, "drop", place.mountpoint, place.mountpoint / "link").returncode == 0
    assert stats()["cache_resident_bytes"] == 0
    for verb in ("warm", "drop"):
        done = run(*REAL, verb, place.mountpoint, "file")
        here = os.path.realpath("file")
        assert done.returncode == 2
        assert f"'{here}' is not below '{place.mountpoint}': relative paths start at" in done.stderr
    assert run(*REAL, "warm", place.mountpoint, place.mountpoint / "none").returncode == 2
    assert run(*REAL, "drop", place.mountpoint, "/etc/passwd").returncode == 2
    for size, why in (("1K", "at least 1M"), ("900T", "more than all RAM")):
        done = run(*REAL, "resize", place.mountpoint, size)
        assert (done.returncode, why in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done

    pid = place.logged_pid()
    done = run(*REAL, "umount", place.mountpoint)
    assert done.returncode == 0, done
    assert not place.is_mounted()
    assert has_ended(pid)


@pytest.mark.mount
def test_the_control_directory_may_have_another_name(place: Place) -> None:
    assert place.mount("--control-name", ".other", "--pool", "none").returncode == 0
    assert b"cache_hits" in (place.mountpoint / ".other" / "stats").read_bytes()
    assert not (place.mountpoint / ".tmemfs").exists()


@pytest.mark.mount
@pytest.mark.skipif(shutil.which("findmnt") is None, reason="findmnt is missing")
def test_the_mount_table_shows_what_it_is(place: Place) -> None:
    assert place.mount("-o", "ro,nosuid,noexec").returncode == 0
    done = run("findmnt", "-no", "FSTYPE,SOURCE,OPTIONS", place.mountpoint)
    fstype, source, options = done.stdout.split(maxsplit=2)
    assert fstype == "fuse.tmemfs"
    assert source == os.fspath(place.source)
    assert {"ro", "nosuid", "noexec", "nodev", "default_permissions"} <= set(options.strip().split(","))
    assert "Read-only" in place.python("open('new', 'w')").stderr


def test_output_of_a_mount_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange:
        def __init__(self, *_: object) -> None:
            pass

        def read(self, _: str) -> bytes:
            return b"cache_hits 1\x1b[2J\ncache_misses \xff\n"

    monkeypatch.setattr("tmemfs.cli.RemoteMount", Strange)
    done = CliRunner().invoke(cli, ["stats", "/mnt"])
    assert (done.exit_code, done.stdout) == (0, "cache_hits 1\\x1b[2J\ncache_misses \\xff\n")
