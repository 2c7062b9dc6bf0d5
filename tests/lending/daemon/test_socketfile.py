"""The listening socket: its mode and group, stale ones, only one tmemd each, and those that systemd passes."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from tmem.lending.daemon.socketfile import SocketFile, default_path, likely_path, parse_mode
from tmem.lending.daemon.tmemd import notify
from tmemcommon.sizes import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.sock"


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(os.fspath(path)) == 0


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_has_the_mode_whatever_the_umask(path: Path, mode: int) -> None:
    before = os.umask(0o027)
    try:
        made = SocketFile.create(path, mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert connects(path)
    made.close()
    assert not path.exists()


@pytest.mark.root
def test_the_file_has_the_group(path: Path) -> None:
    SocketFile.create(path, 0o660, "13001").close()
    made = SocketFile.create(path, 0o660, "13002")
    assert path.stat().st_gid == 13002
    made.close()
    made = SocketFile.create(path, 0o660, "root")
    assert path.stat().st_gid == 0
    made.close()


def test_a_group_that_does_not_exist_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-group"):
        SocketFile.create(path, 0o660, "no-such-group")
    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(os.fspath(path))
    assert path.exists()
    made = SocketFile.create(path)
    assert connects(path)
    made.close()


def test_a_second_one_is_refused_and_disturbs_nothing(path: Path) -> None:
    made = SocketFile.create(path)
    with pytest.raises(ConfigError, match="another tmemd listens"):
        SocketFile.create(path)
    assert connects(path)
    made.close()


def test_a_socket_on_which_somebody_else_listens_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(os.fspath(path))
        other.listen()
        with pytest.raises(ConfigError, match="another tmemd listens"):
            SocketFile.create(path)
        assert connects(path)


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        SocketFile.create(path)
    assert path.read_text() == "precious"


def test_a_lock_that_is_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Path(f"{path}.lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="cannot be made"):
        SocketFile.create(path)
    assert victim.read_text() == "precious"


def test_a_path_without_a_directory_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be made: No such file"):
        SocketFile.create(tmp_path / "missing" / "t.sock")
    with pytest.raises(ConfigError, match="shorter"):
        SocketFile.create(tmp_path / ("x" * 120))


def test_closing_leaves_a_socket_that_somebody_else_put_there(path: Path) -> None:
    made = SocketFile.create(path)
    path.unlink()
    path.write_text("another's")
    made.close()
    assert path.read_text() == "another's"


def test_the_default_path_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_path() == Path("/run/tmemd.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_path() == Path("/run/user/1000/tmemd.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ConfigError, match="--socket PATH"):
        default_path()


def test_the_users_own_tmemd_is_meant_before_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert likely_path() == Path("/run/tmemd.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(tmp_path))
    assert likely_path() == Path("/run/tmemd.sock")
    (tmp_path / "tmemd.sock").touch()
    assert likely_path() == tmp_path / "tmemd.sock"


@pytest.mark.parametrize(("text", "mode"), [("0660", 0o660), ("600", 0o600), ("666", 0o666), ("0", 0)])
def test_modes_are_octal(text: str, mode: int) -> None:
    assert parse_mode(text) == mode


@pytest.mark.parametrize("text", ["", "rw", "888", "01000", "7777", "-1", "0x1", "6 6", "²"])
def test_other_modes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="mode"):
        parse_mode(text)


# -- systemd ---------------------------------------------------------------------------------------------------------

PASSED = """
import os, socket, sys
from tmem.lending.daemon.socketfile import SocketFile
from tmemcommon.sizes import ConfigError
kind, listening, path, count = sys.argv[1], sys.argv[2] == 'yes', sys.argv[3], sys.argv[4]
made = socket.socket(socket.AF_UNIX, getattr(socket, kind))
made.bind(path.replace('@', chr(0)))
if listening:
    made.listen()
os.dup2(made.fileno(), 3)
os.environ.update(LISTEN_PID=str(os.getpid() + (count == 'other')), LISTEN_FDS='1' if count == 'other' else count)
try:
    passed = SocketFile.passed()
except ConfigError as error:
    print(error)
else:
    assert 'LISTEN_FDS' not in os.environ
    print(None if passed is None else passed.path)
    if passed is not None:
        passed.close()
        assert os.path.exists(path), 'the file is the service manager\\'s'
"""


def passed(path: Path, kind: str = "SOCK_STREAM", listening: str = "yes", count: str = "1") -> str:
    words = [sys.executable, "-c", PASSED, kind, listening, os.fspath(path), count]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_socket_that_systemd_passes_is_taken(path: Path) -> None:
    assert passed(path) == os.fspath(path)


def test_sockets_passed_to_another_process_are_not_ours(path: Path) -> None:
    assert passed(path, count="other") == "None"


@pytest.mark.parametrize(
    ("kind", "listening", "count", "reason"),
    [
        ("SOCK_STREAM", "no", "1", "not a listening"),
        ("SOCK_DGRAM", "no", "1", "not a listening"),
        ("SOCK_STREAM", "yes", "2", "2 sockets"),
    ],
)
def test_a_passed_socket_of_another_kind_is_refused(
    path: Path, kind: str, listening: str, count: str, reason: str
) -> None:
    assert reason in passed(path, kind, listening, count)


def test_a_passed_socket_without_a_path_is_refused_as_it_has_no_mode(path: Path) -> None:
    assert "no absolute path" in passed(Path(f"@{path}"))


def test_without_systemd_nothing_was_passed() -> None:
    assert SocketFile.passed({}) is None


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"@tmemd-{os.getpid()}-{os.urandom(4).hex()}" if abstract else os.fspath(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(30)
        manager.bind("\0" + name[1:] if abstract else name)
        assert notify("READY=1", "STATUS=lending", environ={"NOTIFY_SOCKET": name})
        assert manager.recv(100) == b"READY=1\nSTATUS=lending"


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket"])
def test_nobody_who_listens_is_no_error(address: str) -> None:
    assert not notify("READY=1", environ={"NOTIFY_SOCKET": address})
