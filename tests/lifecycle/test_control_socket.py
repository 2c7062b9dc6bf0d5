"""The control socket: it works on any mount, serves root and the owner alone, and bounds all resources."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from tests.conftest import REAL, TINY, Place, run, state_of, wait_until
from tests.lending.otheruser import as_other
from tests.pagebytes import pages_of
from tmemcommon.mountinfo import MountEntry
from tmemcommon.sizes import ConfigError
from tmemfs.fuse.virtualfiles import InvalidInput
from tmemfs.kernel.mounttable import top_mount
from tmemfs.lifecycle import controlclient, controlserver
from tmemfs.lifecycle.controlclient import RemoteError, ask
from tmemfs.lifecycle.controlserver import ControlServer
from tmemfs.lifecycle.controlsocket import MAX_REQUEST, Answer, Request, directories, socket_name
from tmemfs.lifecycle.remotemount import RemoteMount
from tmemfs.stats import Stats
from tmemfs.virtual.controlfiles import ControlFiles

MOUNT = MountEntry("0:4711", Path("/data"), "fuse.tmemfs", "/source", options=(f"user_id={os.geteuid()}",))
JUNK = [
    *(b"", b"\xff", b"\x93\xa1x\xc0\x01", b"\x92\xa1\xff\xc0"),
    msgspec.msgpack.encode(["stats", "text"]),
    b"x" * (MAX_REQUEST + 1),
]


def socket_of(place: Place) -> Path:
    """Return the path of the socket of a mount."""
    entry = top_mount(place.mountpoint)
    assert entry is not None
    return next(directories(os.geteuid())) / socket_name(entry.device)


@pytest.mark.mount
@pytest.mark.parametrize("options", [("-o", "ro"), ("--control-name", ".other")], ids=["read-only", "renamed"])
def test_commands_work_on_a_mount_whose_control_files_do_not(place: Place, options: tuple[str, ...]) -> None:
    (place.source / "f").write_bytes(pages_of(1, 100))
    assert place.mount("--cache", "1M", "--pool", "8M", *options).returncode == 0
    (place.mountpoint / "f").read_bytes()
    done = run(*REAL, "stats", place.mountpoint)
    assert dict(line.split() for line in done.stdout.splitlines())["cache_resident_bytes"] == "409600"
    for words in (("resize", "2M"), ("freeze",), ("thaw",), ("drop", place.mountpoint / "f"), ("freeze",)):
        done = run(*REAL, words[0], place.mountpoint, *words[1:])
        assert (done.returncode, done.stderr) == (0, ""), done
    remote = RemoteMount(place.mountpoint)
    stats = msgspec.json.decode(remote.read("stats.json"))
    assert (stats["cache_capacity_bytes"], stats["cache_resident_bytes"]) == (2 << 20, 0)
    assert (stats["pool_frozen"], stats["backing_pages"]) == (1, 100)
    remote.write("stats", b"reset")
    assert msgspec.json.decode(remote.read("stats.json"))["backing_pages"] == 0
    with pytest.raises(ConfigError, match="more than all RAM"):
        remote.write("cache_size", b"900T")
    done = run(*REAL, "drop", place.mountpoint, place.mountpoint / "none")
    assert (done.returncode, done.stderr) == (2, f"tmemfs: '{place.mountpoint}': there is no file '/none'\n")
    done = run(*REAL, "umount", place.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.mount
def test_each_of_two_mounts_answers_for_itself(place: Place, tmp_path: Path) -> None:
    other = Place(Path(tempfile.mkdtemp(dir=tmp_path)))
    try:
        places = (place, other)
        for each in places:
            assert each.mount(command=TINY).returncode == 0
        pids = [each.logged_pid() for each in places]
        assert [ask_pid(each.mountpoint) for each in places] == pids
        assert socket_of(place) != socket_of(other)
        assert run(*TINY, "umount", other.mountpoint).returncode == 0
        assert ask_pid(place.mountpoint) == pids[0]
    finally:
        other.clean()


def ask_pid(mountpoint: Path) -> int:
    """Return the pid of a mount, by its own answer."""
    lines = RemoteMount(mountpoint).read("config").decode().splitlines()
    return int(dict(line.split(maxsplit=1) for line in lines)["pid"])


@pytest.mark.mount
def test_a_killed_mount_is_reported_and_its_socket_removed(place: Place) -> None:
    process = place.serve(command=TINY)
    left = socket_of(place)
    assert left.is_socket()
    assert (left.parent.stat().st_mode & 0o777, left.stat().st_mode & 0o777) == (0o700, 0o600)
    process.kill()
    process.wait()
    done = run(*TINY, "stats", place.mountpoint)
    assert done.returncode == 1
    assert f"has no process any more: run tmemfs umount {place.mountpoint}" in done.stderr
    assert run(*TINY, "umount", place.mountpoint).returncode == 0
    assert not left.exists()
    stale = left.with_name(f"0:0-{os.getpid()}.sock")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(os.fspath(stale))
    again = place.serve(command=TINY)
    assert not stale.exists(), "the next mount removes what is stale"
    mine = socket_of(place)
    assert mine.is_socket()
    again.terminate()
    again.wait()
    assert not mine.exists()


@pytest.mark.mount
def test_a_stopped_mount_times_out_and_umount_waits_for_its_process(place: Place) -> None:
    process = place.serve(command=TINY)
    entry = top_mount(place.mountpoint)
    assert entry is not None
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: state_of(process.pid) == "T", "the process has stopped")
    try:
        with pytest.raises(RemoteError, match="does not answer"):
            ask(entry, "stats", seconds=0.2)
    finally:
        process.send_signal(signal.SIGCONT)
    assert ask(entry, "stats") is not None


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a directory for sockets that other users could reach if its mode allowed it."""
    made = Path(tempfile.mkdtemp(prefix="tmemfs-test-"))
    made.chmod(0o755)
    place = made / "sockets"
    monkeypatch.setattr(controlclient, "directories", lambda owner: iter([place]))
    monkeypatch.setattr(controlserver, "directories", lambda owner: iter([place]))
    yield place
    shutil.rmtree(made)


class Verbs:
    """Control files, one of which blocks like a backing that hangs."""

    def __init__(self) -> None:
        self.control = ControlFiles(".tmemfs", Stats(), lambda: {"pid": 4711})
        self.control.add_control("wait", None, self._wait)
        self.control.add_control("fail", None, self._fail)
        self.control.add_control("refuse", None, self._refuse)
        self.waiting = 0

    async def _wait(self, data: bytes) -> None:
        self.waiting += 1
        await trio.sleep_forever()

    async def _fail(self, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    async def _refuse(self, data: bytes) -> None:
        raise InvalidInput(f"not\nthis {os.fsdecode(data)}")


def serving(verbs: Verbs, client: Callable[[], object]) -> None:
    """Run the server while a client runs in a thread."""

    async def main() -> None:
        server = ControlServer(verbs.control)
        async with trio.open_nursery() as nursery:
            path = await nursery.start(server.run, MOUNT.device)
            with trio.fail_after(60):
                await trio.to_thread.run_sync(client)
            await server.stop()
        assert not path.exists()

    trio.run(main)


def raw(directory: Path, request: bytes) -> Answer | None:
    """Send any bytes as a request; return the answer, or None if there was none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(os.fspath(directory / socket_name(MOUNT.device)))
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return msgspec.msgpack.decode(answer, type=Answer) if answer else None


def test_errors_are_one_line_and_tell_bad_requests_from_failures(directory: Path) -> None:
    def client() -> None:
        assert ask(MOUNT, "config") == b"pid 4711\n"
        with pytest.raises(RemoteError, match="'/data': No space left on device"):
            ask(MOUNT, "fail", b"1")
        with pytest.raises(ConfigError, match=r"'/data': not this /a\\x1b\[2J\\xff$"):
            ask(MOUNT, "refuse", b"/a\x1b[2J\xff")
        for name, data in (("none", None), ("none", b"1"), ("config", b"1"), ("fail", None), ("../config", None)):
            with pytest.raises(ConfigError, match="there is nothing called"):
                ask(MOUNT, name, data)
        with pytest.raises(ConfigError, match="longer than"):
            ask(MOUNT, "fail", bytes(MAX_REQUEST))
        for junk in JUNK:
            answer = raw(directory, junk)
            assert answer is not None
            assert answer.misused, junk[:10]
        assert ask(MOUNT, "config") == b"pid 4711\n"

    serving(Verbs(), client)


def test_waiting_requests_and_silent_connections_do_not_block_others(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controlserver, "REQUEST_SECONDS", 0.2)
    verbs = Verbs()

    def client() -> None:
        silent = []
        for _ in range(controlserver.MAX_CHANGES):
            with pytest.raises(RemoteError, match="does not answer"):
                ask(MOUNT, "wait", b"1", seconds=0.05)
        wait_until(lambda: verbs.waiting == controlserver.MAX_CHANGES, "all of them wait")
        with pytest.raises(RemoteError, match="16 requests wait for the backing already"):
            ask(MOUNT, "fail", b"1")
        for _ in range(2 * controlserver.MAX_CONNECTIONS):
            silent.append(socket.socket(socket.AF_UNIX))
            silent[-1].connect(os.fspath(directory / socket_name(MOUNT.device)))  # waits while the queue is full
            silent[-1].settimeout(30)
        for connection in silent:
            connection.recv(1 << 16)  # it is told that its request does not end, or ended without a word
        assert ask(MOUNT, "config") == b"pid 4711\n"
        for connection in silent:
            connection.close()

    serving(verbs, client)


@pytest.mark.root
def test_another_user_is_refused_by_directory_server_and_command(directory: Path) -> None:
    def intrude() -> None:
        path = os.fspath(directory / socket_name(MOUNT.device))
        with socket.socket(socket.AF_UNIX) as connection, pytest.raises(PermissionError):
            connection.connect(path)
        with pytest.raises(RemoteError, match=r"only root and its owner \(uid 0\) may control"):
            ask(MOUNT, "config")

    def open_the_door_and_intrude() -> None:
        answer = raw(directory, msgspec.msgpack.encode(Request("config")))
        assert answer is not None
        assert (answer.data, answer.error) == (b"", "only root and uid 0 may ask: use sudo")

    def client() -> None:
        as_other(intrude)
        directory.chmod(0o755)
        (directory / socket_name(MOUNT.device)).chmod(0o666)
        as_other(open_the_door_and_intrude)

    serving(Verbs(), client)


@pytest.mark.root
def test_a_socket_of_another_user_is_not_trusted(directory: Path) -> None:
    directory.mkdir()
    os.chown(directory, 12_001, 12_001)
    with socket.socket(socket.AF_UNIX) as listener:

        def listen() -> None:
            listener.bind(os.fspath(directory / socket_name(MOUNT.device)))
            listener.listen()

        as_other(listen)
        with pytest.raises(RemoteError, match="is held by uid 12001"):
            ask(MOUNT, "config")
    with pytest.raises(PermissionError, match="belongs to uid 12001"):
        trio.run(ControlServer(Verbs().control).run, MOUNT.device)


@pytest.mark.parametrize("answer", [b"", b"\xff", b"\x93\xc4\x00\xa1\xff\xc2", b"\x91" * 4096])
def test_an_invalid_answer_is_an_error_that_names_its_mount(directory: Path, answer: bytes) -> None:
    directory.mkdir()
    failures: list[str] = []

    def client() -> None:
        try:
            ask(MOUNT, "stats.json", seconds=60)
        except RemoteError as error:
            failures.append(str(error))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(60)
        listener.bind(os.fspath(directory / socket_name(MOUNT.device)))
        listener.listen()
        thread = threading.Thread(target=client, daemon=True)
        thread.start()
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(60)
            while connection.recv(MAX_REQUEST):
                pass
            connection.sendall(answer)
        thread.join(60)
    (failure,) = failures
    assert "an answer that is not understood" in failure


def test_a_missing_socket_is_an_error_that_names_its_directories(directory: Path) -> None:
    with pytest.raises(RemoteError, match=f"'/data' has no control socket in '{directory}': run this where"):
        ask(MOUNT, "config")


def test_a_socket_that_was_replaced_is_left_to_its_new_owner(directory: Path) -> None:
    async def main() -> None:
        first, second = (ControlServer(Verbs().control) for _ in range(2))
        async with trio.open_nursery() as nursery:
            path = await nursery.start(first.run, MOUNT.device)
            assert await nursery.start(second.run, MOUNT.device) == path
            await first.stop()
            assert path.is_socket()
            await second.stop()
        assert os.listdir(directory) == []

    trio.run(main)
