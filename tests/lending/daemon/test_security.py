"""What clients of tmemd must not be able to do: to each other, to tmemd, and to the machine."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.conftest import SECONDS, wait_until
from tests.lending.conftest import MakeGuest
from tests.lending.daemon.test_arenas import KINDS
from tests.lending.fakeguest import SEALS, Denied, FakeGuest, GuestRefused, make_arena
from tests.lending.otheruser import OTHER_UID, as_other
from tests.lending.tmemd import Tmemd
from tmem.arena import SLAB_SIZE
from tmem.lending.daemon.connection import READ_BYTES, VERB_FRAMES
from tmem.lending.daemon.ratelimits import FRAMES_BURST, FRAMES_PER_SECOND
from tmem.lending.daemon.server import (
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_USER,
    RESERVED_CONNECTIONS,
    RESERVED_DESCRIPTORS,
)
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.wire import encode

HELLO = encode(m.Hello(m.VERSION, b"t" * 16, "/mnt/x", 256))


class Client:
    """A socket that sends what it likes."""

    def __init__(self, tmemd: Tmemd) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(os.fspath(tmemd.socket))
        self.socket.settimeout(SECONDS)

    def ends(self) -> bool:
        """Read until tmemd hangs up."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        self.socket.close()
        return True


def send_for_ever(stream: socket.socket, data: bytes) -> None:
    while True:
        stream.sendall(data)


def borrow_all(*guests: FakeGuest) -> int:
    """Borrow until nobody is lent anything; tell how many slabs that were."""
    got = 0
    for guest in guests:
        with contextlib.suppress(Denied):
            while True:
                got += len(guest.ask(8))
    return got


def undisturbed(guest: FakeGuest) -> None:
    """Check that another guest is served as before."""
    guest.give(guest.ask(4))


def descriptors(tmemd: Tmemd) -> int:
    return len(os.listdir(f"/proc/{tmemd.pid}/fd"))


# -- arenas ----------------------------------------------------------------------------------------------------------


def test_a_descriptor_that_is_no_arena_is_refused(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    honest = guest().join()
    before = descriptors(tmemd)
    for make, reason in KINDS:
        bad = guest(slabs=64)
        bad.fd = make(bad.fd)
        with pytest.raises(GuestRefused, match=reason):
            bad.join()
        bad.leave()
    wait_until(lambda: descriptors(tmemd) <= before, "nothing of them is kept")
    undisturbed(honest)
    assert tmemd.totals()["guests_refused"] == len(KINDS)


def test_a_guest_without_an_arena_or_of_another_version_is_refused(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    client = Client(tmemd)
    client.socket.sendall(HELLO)
    assert b"no arena" in client.socket.recv(1000)
    assert client.ends()
    client = Client(tmemd)
    fd = make_arena(256)
    socket.send_fds(client.socket, [encode(m.Hello(m.VERSION + 1, b"t" * 16, "/mnt/x", 256))], [fd])
    os.close(fd)
    assert b"version" in client.socket.recv(1000)
    assert client.ends()
    undisturbed(guest().join())


def test_an_arena_can_neither_shrink_nor_grow_nor_be_sealed_any_more(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    one = guest().join()
    got = one.ask(16)
    for size in (0, 255 * SLAB_SIZE, 257 * SLAB_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(one.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(one.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert fcntl.fcntl(one.fd, fcntl.F_GET_SEALS) == SEALS
    assert one.populated_slabs() == len(got)


def test_no_guest_gets_at_another_ones_arena(tmemd: Tmemd, guest: MakeGuest) -> None:
    """All that tmemd ever sends is bytes: no descriptor comes out of it."""
    tmemd.start("4M")
    victim, thief = guest(persistent=32).join(), guest()
    victim.ask_until(16, persistent=True)
    thief.token = victim.token
    with pytest.raises(GuestRefused):
        thief.join(again=True)
    thief.leave()
    thief.token = os.urandom(16)
    thief.join()
    thief.send(m.Ask(1, 16))
    _, fds, _, _ = socket.recv_fds(thief.socket, 1 << 16, 8)
    assert fds == []
    assert victim.populated_slabs() == 16


def test_what_one_guest_returns_reaches_another_as_zeros(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("1M")
    one, two = guest().join(), guest().join()
    for slab in one.ask_until(16):
        one.write(slab, b"secret" * 100)
    one.give(set(one.held))
    for slab in two.ask_until(16):
        assert two.read(slab, SLAB_SIZE) == bytes(SLAB_SIZE)
        with mmap.mmap(two.fd, SLAB_SIZE, offset=slab * SLAB_SIZE) as mapped:
            assert mapped[:] == bytes(SLAB_SIZE)


@pytest.mark.root
def test_another_process_of_the_same_user_gets_at_nothing_of_tmemd(tmemd: Tmemd) -> None:
    def start_and_look() -> None:
        mine = Tmemd(tmemd.directory / "mine")
        mine.start("4M")
        try:
            FakeGuest(mine.socket).join().ask(4)
            process = Path(f"/proc/{mine.pid}")
            for path in ("fd", "map_files"):
                with pytest.raises(PermissionError):
                    os.listdir(process / path)
            for path in ("mem", "environ", "fd/5"):
                with pytest.raises(PermissionError):
                    (process / path).read_bytes()
        finally:
            mine.stop()

    (tmemd.directory / "mine").mkdir()
    os.chown(tmemd.directory / "mine", OTHER_UID, OTHER_UID)
    as_other(start_and_look)


# -- frames ----------------------------------------------------------------------------------------------------------

MALFORMED = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff" + b"x" * 100,
    (65537).to_bytes(4, "little"),
    b"\x04\0\0\0junk",
    b"GET / HTTP/1.1\r\nHost: tmemd\r\n\r\n",
    encode(m.Ask(1, 1)),  # a guest's message without a Hello
    encode(m.Deny(1, "no")),  # messages that tmemd sends
    encode(m.Done("yes")),
)


def test_malformed_frames_are_cut_off_and_counted(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    honest = guest().join()
    for number, data in enumerate(MALFORMED, 1):
        client = Client(tmemd)
        client.socket.sendall(data)
        assert client.ends()
        undisturbed(honest)
        assert tmemd.totals()["cut_off_malformed"] == number, data


def test_a_truncated_frame_is_counted_and_a_silent_client_is_cut_off(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    honest = guest().join()
    truncated, silent, dripping = Client(tmemd), Client(tmemd), Client(tmemd)
    truncated.socket.sendall(HELLO[:-3])
    truncated.socket.shutdown(socket.SHUT_WR)
    dripping.socket.sendall(HELLO[:3])
    for client in (truncated, silent, dripping):
        assert client.ends()
    undisturbed(honest)
    totals = tmemd.totals()
    assert totals["cut_off_malformed"] == 1
    assert totals["cut_off_silent"] == 2


LIES = (
    m.Hello(m.VERSION, b"u" * 16, "/mnt/y", 256),  # hello twice
    m.Return(((100, 50),)),  # never lent
    m.Return(((255, 2),)),  # beyond the arena
    m.Return(((0, 1),), persistent=True),  # lent as the other kind
    m.Claim(((0, 1),), persistent=False, last=True),  # not asked for
    m.Confirm(77),  # of nothing
    m.Resize(1),  # a verb
)


def test_who_lies_is_cut_off_and_counted(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    honest = guest().join()
    for number, lie in enumerate(LIES, 1):
        liar = guest().join()
        liar.ask(4)
        liar.send(lie)  # type: ignore[arg-type]
        with pytest.raises(ConnectionError):
            liar.expect(m.Welcome)
        undisturbed(honest)
        totals = tmemd.totals()
        assert totals["cut_off_faulty"] + totals["cut_off_malformed"] == number, lie


def test_foreign_descriptors_are_closed_and_their_sender_cut_off(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    honest = guest().join()
    before = descriptors(tmemd)
    arena = make_arena(256)
    for count in (2, 3, 64, 253):
        client = Client(tmemd)
        socket.send_fds(client.socket, [HELLO], [arena] * count)
        assert client.ends()
    late = guest().join()
    socket.send_fds(late.socket, [encode(m.Ask(1, 1))], [arena])
    with pytest.raises(ConnectionError):
        late.expect(m.Lend)
    late.leave()
    os.close(arena)
    # The late one's arena and its process stay known: it is a guest that is away.
    wait_until(lambda: descriptors(tmemd) <= before + 2, "every descriptor is closed")
    undisturbed(honest)
    assert tmemd.totals()["cut_off_foreign_descriptors"] == 5


def test_flooding_is_cut_off_and_counted(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    honest, flooding = guest().join(), guest().join()
    # So short that one look at the socket finds more than are allowed: a slow tmemd would never see a flood else.
    nothing = encode(m.Return(()))
    assert READ_BYTES // len(nothing) > FRAMES_BURST
    with pytest.raises(ConnectionError):
        send_for_ever(flooding.socket, nothing * 1000)
    undisturbed(honest)
    client = Client(tmemd)
    with pytest.raises(ConnectionError):
        send_for_ever(client.socket, encode(m.List()) * 1000)
    undisturbed(honest)
    assert tmemd.totals()["cut_off_flooding"] == 2


def test_who_does_not_read_is_cut_off_and_stops_nobody(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    honest = guest().join()
    for number in range(20):
        guest(name=f"/mnt/{number:0>500}", slabs=16).join()
    slow = Client(tmemd)
    slow.socket.sendall(encode(m.List()) * 100)  # a megabyte of answers, more than a socket holds
    undisturbed(honest)
    wait_until(lambda: tmemd.totals()["cut_off_slow"] == 1, "it is cut off")
    undisturbed(honest)
    assert slow.ends()


@contextlib.contextmanager
def crowd(tmemd: Tmemd, users: int, connections: int) -> Iterator[list[Client]]:
    """Connect so many times as each of so many users, for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients: list[Client] = []
    try:
        for uid in range(OTHER_UID, OTHER_UID + users):
            os.seteuid(uid)
            clients += [Client(tmemd) for _ in range(connections)]
            os.seteuid(0)
        yield clients
    finally:
        os.seteuid(0)
        for client in clients:
            client.socket.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.root
def test_connections_are_bounded_per_user_and_root_can_always_connect(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M", "--mode", "0666")
    most = MAX_CONNECTIONS - RESERVED_CONNECTIONS
    users = most // MAX_CONNECTIONS_PER_USER + 2
    with crowd(tmemd, users, MAX_CONNECTIONS_PER_USER + 2) as clients:
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.socket.sendall(encode(m.List()))  # who has asked something may then be silent for a minute
        assert all(client.ends() for client in clients[MAX_CONNECTIONS_PER_USER : MAX_CONNECTIONS_PER_USER + 2])
        assert clients[-1].ends()
        undisturbed(guest().join())
        assert tmemd.totals()["connections_refused"] >= len(clients) - most


@pytest.mark.root
def test_a_user_with_many_connections_is_answered_no_more_than_its_budget(tmemd: Tmemd) -> None:
    tmemd.start("4M", "--mode", "0666")
    verbs = 60
    with crowd(tmemd, 1, 64) as clients:
        began = time.monotonic()
        for client in clients:
            client.socket.setblocking(False)
            client.socket.sendall(encode(m.List()) * verbs)
        answered = 0
        while time.monotonic() < began + 2.0:
            tmemd.totals()
            for client in clients:
                with contextlib.suppress(BlockingIOError):
                    answered += len(client.socket.recv(1 << 16)) // len(encode(m.Table((), True)))
        frames = FRAMES_BURST + FRAMES_PER_SECOND * (time.monotonic() - began)
        assert answered <= frames / VERB_FRAMES + verbs < len(clients) * verbs


def test_one_user_borrows_no_more_than_its_cap(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("8M", "--mode", "0666", "--uid-cap", "2M")

    def other() -> None:
        one, two = guest().join(), guest().join()
        assert borrow_all(one, two) == 32
        with pytest.raises(Denied, match="user"):
            one.ask(1)

    as_other(other)
    assert len(guest().join().ask_until(100)) == 100, "root is not bounded"


@pytest.mark.root
def test_by_default_a_user_is_promised_half_of_the_memory_and_root_all(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("8M", "--mode", "0666")

    def other() -> None:
        with pytest.raises(GuestRefused, match="only 4M"):
            FakeGuest(tmemd.socket, persistent=65).join()
        one = FakeGuest(tmemd.socket, persistent=64).join()
        assert len(one.ask_until(64, persistent=True)) == 64
        assert len(FakeGuest(tmemd.socket).join().ask_until(32)) == 32, "what can be taken is not bounded"

    as_other(other)
    wait_until(lambda: not tmemd.rows(), "its guests have ended")
    assert len(guest(persistent=128).join().ask_until(128, persistent=True)) == 128


@pytest.mark.root
def test_the_last_descriptors_are_kept_for_root(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M", "--mode", "0666")
    few = RESERVED_DESCRIPTORS + 40
    resource.prlimit(tmemd.pid, resource.RLIMIT_NOFILE, (few, few))
    with crowd(tmemd, 1, 60) as clients:
        assert clients[-1].ends()
        assert tmemd.totals()["connections_refused"] >= 20
        undisturbed(guest().join())


def test_a_name_is_bounded_and_cannot_break_a_log_line(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("4M")
    guest(name="x\nERROR forged: line\r\x1b[2J").join()
    assert "\nERROR forged" not in tmemd.log_text()
    assert "\x1b" not in tmemd.log_text()
    client = Client(tmemd)
    body = msgspec.msgpack.encode(m.Hello(m.VERSION, b"t" * 16, "x" * 513, 256))
    client.socket.sendall(len(body).to_bytes(4, "little") + body)
    assert client.ends()
    assert tmemd.totals()["cut_off_malformed"] == 1
