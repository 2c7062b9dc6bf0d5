"""The handshake: its changes to an INIT reply, and their effect on a mount. The failures patch the Python handshake."""

from __future__ import annotations

import os
import struct
import sys

import pytest

from tests.conftest import REPOSITORY, TINY, Place, run
from tmemfs.kernel.session import HandshakeError, patch_init

INIT_EXT, DONT_MASK, KILLPRIV, ALLOW_MMAP = 1 << 30, 1 << 6, 1 << 19, 1 << 4


def request(flags: int, flags2: int, extended: bool = True) -> bytes:
    """Return an INIT request as the kernel sends it."""
    body = struct.pack("=IIII", 7, 45, 1 << 17, flags) + (struct.pack("=I44x", flags2) if extended else b"")
    return struct.pack("=IIQQIIIHH", 40 + len(body), 26, 1, 0, 0, 0, 0, 0, 0) + body


def reply(flags: int, error: int = 0) -> bytes:
    """Return an INIT reply as libfuse sends it."""
    body = struct.pack("=IIIIHHIIHHI28x", 7, 36, 1 << 17, flags, 12, 9, 1 << 20, 1, 256, 0, 0)
    return struct.pack("=IiQ", 16 + len(body), error, 1) + body


def flags_of(patched: bytes) -> tuple[int, int]:
    """Return flags and flags2 of a reply."""
    return struct.unpack_from("=I", patched, 16 + 12)[0], struct.unpack_from("=I", patched, 16 + 32)[0]


def test_shared_mmap_is_requested_if_the_kernel_offers_it() -> None:
    patched, shared_mmap = patch_init(request(INIT_EXT | DONT_MASK, ALLOW_MMAP), reply(KILLPRIV | 1))
    assert shared_mmap
    assert flags_of(patched) == (INIT_EXT | DONT_MASK | 1, ALLOW_MMAP)
    assert len(patched) == len(reply(0))


@pytest.mark.parametrize(
    "offer", [request(INIT_EXT, 0), request(0, ALLOW_MMAP), request(INIT_EXT, ALLOW_MMAP, extended=False)]
)
def test_no_flag_is_set_that_the_kernel_did_not_offer(offer: bytes) -> None:
    patched, shared_mmap = patch_init(offer, reply(1))
    assert not shared_mmap
    assert flags_of(patched) == (1, 0)


def test_the_rest_of_the_reply_is_unchanged() -> None:
    before = reply(1)
    after, _ = patch_init(request(INIT_EXT, ALLOW_MMAP), before)
    assert after[:28] == before[:28]
    assert after[36:48] == before[36:48]
    assert after[52:] == before[52:]


def test_hanging_background_requests_leave_room_for_hundreds_of_others() -> None:
    patched, _ = patch_init(request(INIT_EXT, ALLOW_MMAP), reply(1))
    most, congested = struct.unpack_from("=HH", patched, 16 + 16)
    assert most > congested > 1000


@pytest.mark.parametrize("bad", [reply(1, error=-22), reply(1)[:40], reply(1) + b"x"])
def test_an_invalid_reply_is_a_failed_handshake(bad: bytes) -> None:
    with pytest.raises(HandshakeError):
        patch_init(request(INIT_EXT, ALLOW_MMAP), bad)


SHARED_MMAP = """
import mmap
fd = os.open('data', os.O_RDWR)
mapped = mmap.mmap(fd, 65536, mmap.MAP_SHARED)
assert mapped[:4] == b'tiny'
mapped[4096:4100] = b'mmap'
mapped.flush()
assert os.pread(fd, 4, 4096) == b'mmap'
mapped.close()
"""


@pytest.mark.mount
def test_a_direct_io_file_can_be_written_through_a_shared_mapping(place: Place) -> None:
    assert place.mount(command=TINY).returncode == 0
    if "shared mmap is off" in place.log_text():
        pytest.skip("this kernel has no shared mmap on direct I/O (Linux 6.6 has)")
    done = place.python(SHARED_MMAP)
    assert done.returncode == 0, done
    assert run(*TINY, "umount", place.mountpoint).returncode == 0
    assert (place.source / "written").read_bytes()[4096:4100] == b"mmap"


FAIL = """
import sys, os
sys.argv[0] = {tiny!r}
import tmemfs.kernel.session
{break_it}
exec(compile(open({tiny!r}).read(), {tiny!r}, 'exec'), {{'__name__': '__main__'}})
"""
NO_INIT = """
def no_init(device):
    raise tmemfs.kernel.session.HandshakeError('no INIT in this test')
tmemfs.kernel.session._receive_init = no_init
"""
NO_REPLY = """
def no_reply(request, reply):
    raise tmemfs.kernel.session.HandshakeError('no reply in this test')
tmemfs.kernel.session.patch_init = no_reply
"""


@pytest.mark.mount
@pytest.mark.parametrize("break_it", [NO_INIT, NO_REPLY], ids=["before-libfuse", "after-libfuse"])
def test_a_failed_handshake_leaves_a_plain_mount_without_shared_mmap(place: Place, break_it: str) -> None:
    tiny = os.fspath(REPOSITORY / "tests" / "lifecycle" / "tinyguest.py")
    command = (sys.executable, "-c", FAIL.format(tiny=tiny, break_it=break_it))
    done = place.mount(command=command)
    assert done.returncode == 0, done
    assert "shared mmap is off" in place.log_text()
    assert place.python("assert open('data').read(4) == 'tiny'").returncode == 0
    assert "No such device" in place.python(SHARED_MMAP).stderr
    assert run(*TINY, "umount", place.mountpoint).returncode == 0
    assert not place.is_mounted()
    assert (place.source / "written").exists()
