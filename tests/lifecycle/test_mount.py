"""The lifecycle of a mount: all ways to start it and all ways to end it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calls import GONE, code_of
from tests.conftest import REAL, REPOSITORY, SECONDS, TINY, Place, has_ended, run, wait_until
from tests.lifecycle.tinyguest import FILE_BYTES
from tests.mounted import needs
from tmemfs.kernel.kernelmount import CONNECTIONS
from tmemfs.kernel.mounttable import mount_table, top_mount

pytestmark = pytest.mark.mount
HOLD = "file = open({path!r})\nprint('open', flush=True)\nsys.stdin.read() if {wait} else file.read()"


def hold(place: Place, name: str = "data", wait: bool = True) -> subprocess.Popen[str]:
    """Start a process that keeps a file of the mount open, or one that hangs in a read."""
    code = "import sys\n" + HOLD.format(path=os.fspath(place.mountpoint / name), wait=wait)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    place.adopt(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def end(process: subprocess.Popen[str]) -> int:
    """Wait for the end of a process and return its exit code."""
    process.communicate(timeout=SECONDS)
    return process.returncode


def test_mount_returns_once_it_works_and_umount_waits_for_the_end(place: Place) -> None:
    done = place.mount(command=TINY)
    assert done.returncode == 0
    assert f"{place.source} on {place.mountpoint}, pid {place.logged_pid()}, log {place.log}" in done.stderr
    pid = place.logged_pid()
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert run(*TINY, "umount", place.mountpoint).returncode == 0
    assert has_ended(pid)
    assert (place.source / "written").stat().st_size == FILE_BYTES


def test_hangup_reopens_the_log_and_does_nothing_else(place: Place) -> None:
    """As logrotate does it: rename, signal. Twice, because a second ending signal would abort the mount."""
    process = place.serve(command=TINY)
    for number in range(2):
        rotated = place.log.with_suffix(f".{number}")
        place.log.rename(rotated)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reopened" in place.log_text(), "the log is reopened")
        assert "unmount" not in rotated.read_text() + place.log_text()
    place.log.unlink()
    place.log.mkdir()  # cannot be opened as a log
    process.send_signal(signal.SIGHUP)
    assert place.python("assert open('data').read(4) == 'tiny'").returncode == 0
    place.log.rmdir()
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reopened" in place.log_text(), "the log is reopened")
    process.terminate()
    assert end(process) == 0
    assert place.log_text().count("received") == 2, "the last SIGHUP and SIGTERM"


def test_hangup_does_nothing_without_a_log_file(place: Place) -> None:
    words = ("mount", os.fspath(place.source), os.fspath(place.mountpoint), "-f")
    process = place.start(*TINY, *words)
    wait_until(place.is_mounted, "mounted")
    assert process.stderr is not None
    assert ", pid " in process.stderr.readline() + process.stderr.readline(), "it works"
    process.send_signal(signal.SIGHUP)
    assert place.python("assert open('data').read(4) == 'tiny'").returncode == 0
    process.terminate()
    assert end(process) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_writes_back_and_ends(place: Place, number: signal.Signals) -> None:
    process = place.serve(command=TINY)
    process.send_signal(number)
    assert end(process) == 0
    assert not place.is_mounted()
    assert (place.source / "written").exists()


def test_a_mount_in_use_is_detached_and_served_until_its_last_user_ends(place: Place) -> None:
    process = place.serve(command=TINY)
    user = hold(place)
    process.terminate()
    wait_until(lambda: not place.is_mounted(), "hidden")
    wait_until(lambda: "until its last user is gone" in place.log_text(), "logged")
    assert process.poll() is None
    assert not (place.source / "written").exists()
    user.communicate("", timeout=SECONDS)
    assert end(process) == 0
    assert (place.source / "written").exists()


def test_writes_of_the_last_user_are_kept(place: Place) -> None:
    process = place.serve(command=TINY)
    path = os.fspath(place.mountpoint / "data")
    code = (
        f"import sys\nfile = open({path!r}, 'r+b', 0)\nprint('open', flush=True)\nsys.stdin.read()\nfile.write(b'late')"
    )
    user = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, text=True)
    place.adopt(user)
    assert user.stdout is not None
    assert user.stdout.readline() == "open\n"
    process.terminate()
    wait_until(lambda: not place.is_mounted(), "hidden")
    user.communicate("", timeout=SECONDS)
    assert user.returncode == 0
    assert end(process) == 0
    assert (place.source / "written").read_bytes()[:4] == b"late"


def test_a_second_signal_aborts_a_request_that_hangs(place: Place) -> None:
    process = place.serve(command=TINY)
    user = hold(place, "hang", wait=False)
    process.terminate()
    wait_until(lambda: "until its last user is gone" in place.log_text(), "detached")
    process.terminate()
    assert end(process) == 0
    _, errors = user.communicate(timeout=SECONDS)
    assert user.returncode == 1
    assert "OSError" in errors or "ConnectionAbortedError" in errors
    assert not place.is_mounted()
    assert (place.source / "written").exists()


def test_an_aborted_mount_ends_even_if_a_handler_hangs(place: Place) -> None:
    process = place.serve(command=TINY)
    user = hold(place, "hang", wait=False)
    entry = top_mount(place.mountpoint)
    assert entry is not None
    control = CONNECTIONS / entry.device.partition(":")[2] / "abort"
    if not os.access(control, os.W_OK):
        pytest.skip("fusectl is not mounted at /sys/fs/fuse/connections")
    control.write_text("1")
    assert end(process) == 0
    assert end(user) == 1
    assert not place.is_mounted()


def test_200_hanging_readers_do_not_block_another_one(place: Place) -> None:
    process = place.serve(command=TINY)
    code = (
        "import os, sys, threading\n"
        f"fd = os.open({os.fspath(place.mountpoint / 'hang')!r}, os.O_RDONLY)\n"
        "threads = [threading.Thread(target=os.pread, args=(fd, 1, 0)) for _ in range(200)]\n"
        "for thread in threads: thread.start()\n"
        "print('open', flush=True)"
    )
    user = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    place.adopt(user)
    assert user.stdout is not None
    assert user.stdout.readline() == "open\n"
    assert run("head", "-c", "4", place.mountpoint / "data").stdout == "tiny"
    # A reader whose request is with the filesystem cannot even be killed until that is answered or aborted.
    user.kill()
    process.terminate()
    wait_until(lambda: "until its last user is gone" in place.log_text(), "detached")
    process.terminate()
    assert end(process) == 0
    assert end(user) == -signal.SIGKILL


def test_an_external_umount_ends_the_process_cleanly(place: Place) -> None:
    process = place.serve(command=TINY)
    assert run("umount", place.mountpoint).returncode == 0
    assert end(process) == 0
    assert (place.source / "written").exists()
    assert "Traceback" not in place.log_text()


# A guest to whom every mount has the same number, as the next one may well get that of a connection that has ended.
SAME_NUMBER = """
import dataclasses, sys
sys.argv[0] = {tiny!r}
import tmemfs.lifecycle.mount as mount
top_mount = mount.top_mount
def same_number(at):
    entry = top_mount(at)
    return entry and dataclasses.replace(entry, device='0:1')
mount.top_mount = same_number
exec(compile(open({tiny!r}).read(), {tiny!r}, 'exec'), {{'__name__': '__main__'}})
"""


def test_a_mount_still_writing_back_leaves_its_successor_alone(place: Place) -> None:
    os.mkfifo(place.source / "written")  # the end waits for a reader
    process = place.serve(command=(sys.executable, "-c", SAME_NUMBER.format(tiny=TINY[-1])))
    assert run("umount", place.mountpoint).returncode == 0
    again = place.serve(command=TINY)
    assert process.poll() is None
    assert len((place.source / "written").read_bytes()) == FILE_BYTES
    assert end(process) == 0
    assert place.is_mounted()
    assert place.python("assert open('data').read(4) == 'tiny'").returncode == 0
    assert again.poll() is None


def test_after_kill_9_a_new_mount_takes_the_place_of_the_dead_one(place: Place) -> None:
    process = place.serve(command=TINY)
    process.kill()
    process.wait(SECONDS)
    assert code_of(lambda: os.listdir(place.mountpoint)) in GONE
    again = place.serve(command=TINY)
    assert len([entry for entry in mount_table() if entry.mountpoint == place.mountpoint]) == 1
    assert place.python("assert open('data').read(4) == 'tiny'").returncode == 0
    again.terminate()
    assert end(again) == 0


def test_after_kill_9_the_dead_mount_can_be_unmounted(place: Place) -> None:
    process = place.serve(command=TINY)
    process.kill()
    process.wait(SECONDS)
    assert run(*TINY, "umount", place.mountpoint).returncode == 0
    assert not place.is_mounted()


def test_a_live_mount_is_not_mounted_over(place: Place) -> None:
    assert place.mount(command=TINY).returncode == 0
    done = run(*TINY, "mount", place.source, place.mountpoint)
    assert done.returncode == 2
    assert "already a tmemfs mount" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_directory_can_be_mounted_over_itself(place: Place) -> None:
    (place.source / "below").touch()
    process = place.serve(command=TINY, mountpoint=place.source)
    assert run("cat", place.source / "data").stdout.startswith("tiny")
    assert run("ls", place.source / "below").returncode != 0
    # Dead over itself: the new mount must open the directory below.
    process.kill()
    process.wait(SECONDS)
    again = place.serve(command=TINY, mountpoint=place.source)
    again.terminate()
    assert end(again) == 0
    assert {path.name for path in place.source.iterdir()} == {"below", "written"}


def test_a_mount_inherits_no_descriptors(place: Place) -> None:
    lock = place.log.with_name("lock")
    assert place.mount(command=("flock", "--nonblock", os.fspath(lock), *REAL)).returncode == 0
    assert run("flock", "--nonblock", lock, "true").returncode == 0
    assert run(*REAL, "umount", place.mountpoint).returncode == 0


def test_a_source_whose_name_is_not_utf8_is_mounted_and_unmounted(place: Place) -> None:
    place.source = place.source.rename(place.source.with_name(os.fsdecode(b"s\xff")))
    assert place.mount().returncode == 0
    pid = place.logged_pid()
    assert b"s\xff" in (place.mountpoint / ".tmemfs" / "config").read_bytes()
    done = run(*REAL, "umount", place.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert has_ended(pid)


def test_umount_refuses_a_mount_in_use_and_lazy_waits_for_its_last_user(place: Place) -> None:
    process = place.serve(command=TINY)
    user = hold(place)
    done = run(*TINY, "umount", place.mountpoint)
    assert done.returncode == 1
    assert "in use" in done.stderr
    waiting = place.start(*TINY, "umount", "--lazy", os.fspath(place.mountpoint))
    wait_until(lambda: not place.is_mounted(), "hidden")
    assert waiting.poll() is None
    user.communicate("", timeout=SECONDS)
    assert end(waiting) == 0
    assert end(process) == 0


# A new mount namespace copies the mounts of tests that run beside this one, and their umount would wait for it.
LEAVE_OTHERS = """
while read -r _ _ _ _ point _ rest; do
    case "$rest" in *fuse*tmemfs*) [ "$point" = "$0" ] || umount -l "$point";; esac
done < /proc/self/mountinfo
"""


@contextlib.contextmanager
def copy_elsewhere(place: Place) -> Iterator[subprocess.Popen[str]]:
    """Run a process in another mount namespace, which has a copy of the mount until its input ends."""
    script = LEAVE_OTHERS + "echo ready; read line"
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, os.fspath(place.mountpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.communicate("", timeout=SECONDS)


@pytest.mark.root
@needs("unshare", "nsenter")
def test_umount_names_copies_in_other_namespaces_and_times_out(place: Place) -> None:
    process = place.serve(command=TINY)
    with copy_elsewhere(place) as holder:
        done = run(*TINY, "umount", place.mountpoint, "--timeout", "1200ms")
        assert done.returncode == 3, done
        waiting, given_up = done.stderr.splitlines()
        for line in (waiting, given_up):
            assert f"of pid {holder.pid} (sh), there at '{place.mountpoint}'" in line
        assert f"(pid {process.pid}) has not ended after 1.2 s" in given_up
        assert not place.is_mounted()
        assert process.poll() is None
        remedy = given_up.partition("end it, or ")[2].rstrip(")")
        assert run(*remedy.split()).returncode == 0
        assert end(process) == 0, "the remedy in the message works"


@pytest.mark.root
@needs("unshare")
def test_umount_returns_as_soon_as_the_last_copy_has_ended(place: Place) -> None:
    process = place.serve(command=TINY)
    bound = place.log.with_name("bound")
    bound.mkdir()
    with copy_elsewhere(place) as holder:
        assert run("mount", "--bind", place.mountpoint, bound).returncode == 0
        try:
            umount = place.start(*TINY, "umount", os.fspath(place.mountpoint), "--timeout", "1h")
            assert umount.stderr is not None
            line = umount.stderr.readline()
            assert f"a copy in '{bound}' (tmemfs umount {bound}), the mount namespace of pid {holder.pid}" in line
            assert not place.is_mounted()
        finally:
            assert run("umount", bound).returncode == 0
        assert umount.poll() is None
    assert end(umount) == 0
    assert end(process) == 0


def test_a_failure_after_the_checks_is_one_line_and_leaves_nothing(place: Place) -> None:
    code = (
        f"import sys; sys.argv[0] = {TINY[-1]!r}\nimport tmemfs.lifecycle.mount\n"
        "def refuse(*_): raise PermissionError(1, 'Operation not permitted')\n"
        "import tmemfs.kernel.session; tmemfs.kernel.session.mount_fuse = refuse\n"
        f"exec(compile(open({TINY[-1]!r}).read(), 'tiny', 'exec'), {{'__name__': '__main__'}})"
    )
    for options in ([], ["-f"]):
        done = run(sys.executable, "-c", code, "mount", place.source, place.mountpoint, "--log", place.log, *options)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"tmemfs: cannot mount on '{place.mountpoint}': Operation not permitted; "
            "check your permissions (in a container: CAP_SYS_ADMIN and /dev/fuse)"
        ]
    assert not place.is_mounted()


USER_SCRIPT = """
set -eu
mount -t tmpfs -o mode=755 none {dir}/dev
mknod -m 666 {dir}/dev/fuse c 10 229
mount --bind {dir}/dev/fuse /dev/fuse
cd {dir}
exec setpriv --reuid=65534 --regid=65534 --clear-groups env HOME={dir}/home bash -eu -c '
tiny() {{ timeout 120 {python} {tiny} "$@"; }}
tiny mount source mnt
grep -q " {dir}/mnt .*fuse.tmemfs" /proc/self/mountinfo
head -c 4 mnt/data
tiny stats mnt
timeout 120 {python} -c "{mmap}"
tiny umount mnt
if grep -q " {dir}/mnt " /proc/self/mountinfo; then exit 9; fi
tiny mount source mnt
kill -9 $(awk "/pid/ {{print \\$2}}" mnt/.tmemfs/config)
while head -c 4 mnt/data > /dev/null 2>&1; do sleep 0.05; done
tiny mount source mnt -f --log last &
until head -c 4 mnt/data > /dev/null 2>&1; do sleep 0.05; done
kill -TERM $(awk "/pid/ {{print \\$2}}" mnt/.tmemfs/config)
wait
if grep -q " {dir}/mnt " /proc/self/mountinfo; then exit 8; fi
set +e
tiny mount source mnt -o allow_other; echo code $?
tiny mount closed mnt; echo code $?
ls home/.local/state/tmemfs
'
"""


@pytest.mark.root
@pytest.mark.skipif(not all(map(shutil.which, ("unshare", "setpriv"))), reason="unshare or setpriv is missing")
@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="fusermount3 is missing")
def test_an_ordinary_user_mounts_through_fusermount(place: Place) -> None:
    base = Path(run("mktemp", "-d", "/tmp/tmemfs-user-XXXXXX").stdout.strip())
    try:
        for name in ("source", "mnt", "home", "dev", "closed"):
            (base / name).mkdir()
            os.chown(base / name, 65534, 65534)
        os.chown(base / "closed", 0, 0)
        (base / "closed").chmod(0o700)
        os.chown(base, 65534, 65534)
        base.chmod(0o755)
        if (
            run(
                "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, TINY[-1], "--help"
            ).returncode
            != 0
        ):
            pytest.skip(f"{REPOSITORY} or its Python cannot be read by other users")
        mmap = "import mmap; f = open('mnt/data', 'r+b'); m = mmap.mmap(f.fileno(), 4096); m[:4] = b'user'"
        script = USER_SCRIPT.format(dir=base, python=sys.executable, tiny=TINY[-1], mmap=mmap.replace("'", "'\\''"))
        done = run("unshare", "-m", "--propagation", "private", "bash", "-c", LEAVE_OTHERS + script, seconds=240)
        assert done.returncode == 0, done
        assert done.stdout.startswith("tiny")
        assert done.stdout.count("code 2") == 2
        assert "user_allow_other" in done.stderr
        assert "may not be read by you" in done.stderr
        assert "Traceback" not in done.stderr
        assert "its end was not waited for" not in done.stderr, "its socket was found"
        assert ".log" in done.stdout
        assert (base / "source" / "written").read_bytes()[:4] in (b"user", b"tiny")
    finally:
        shutil.rmtree(base, ignore_errors=True)


def test_a_log_that_blocks_delays_neither_requests_nor_the_end(place: Place) -> None:
    (place.source / "data").write_bytes(b"real")
    os.mkfifo(place.log)
    fifo = os.open(place.log, os.O_RDWR | os.O_NONBLOCK)
    try:
        words = ("mount", os.fspath(place.source), os.fspath(place.mountpoint), "-f", "--log", os.fspath(place.log))
        process = place.start(*REAL, *words)
        wait_until(place.is_mounted, "mounted")
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fifo, b"x\n" * 2048)
        refused = "try: os.write(os.open('.tmemfs/cache_size', os.O_WRONLY), b'no')\nexcept OSError: pass"
        for _ in range(3):  # the log says why, and would wait for its reader
            assert place.python(f"{refused}\nassert open('data').read() == 'real'").returncode == 0
        process.terminate()
        assert end(process) == 0
    finally:
        os.close(fifo)
