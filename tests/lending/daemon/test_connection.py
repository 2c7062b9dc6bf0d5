"""One connection: what is cut off, what is closed, what waits, all without waiting."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator

import pytest

from tests.lending.fakeguest import make_arena
from tmem.lending.daemon import connection as limits
from tmem.lending.daemon import ratelimits
from tmem.lending.daemon.connection import Connection, CutOff, Ended
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.wire import encode

HELLO = encode(m.Hello(m.VERSION, b"t" * 16, "/mnt/a", 256))


class Pair:
    """A connection and its peer's socket."""

    def __init__(self) -> None:
        self.peer, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.peer.setblocking(False)
        self.connection = Connection(ours, 0.0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.connection.check()
    made.connection.close()
    made.peer.close()


def descriptors() -> set[str]:
    gc.collect()  # what earlier tests left to it is not to be closed between two looks
    return set(os.listdir("/proc/self/fd"))


def cut(pair: Pair, now: float = 0.0) -> str:
    try:
        while True:
            pair.connection.receive(now)
    except CutOff as error:
        return error.kind


def test_nothing_there_is_no_message(pair: Pair) -> None:
    assert pair.connection.receive(0.0) == []


def test_messages_come_in_order_however_they_are_cut(pair: Pair) -> None:
    stream = HELLO + encode(m.Ask(1, 5)) + encode(m.Ask(2, 6))
    got = []
    for byte in stream:
        pair.peer.send(bytes([byte]))
        got += pair.connection.receive(0.0)
    assert [type(message) for message in got] == [m.Hello, m.Ask, m.Ask]


def test_the_end_is_told_and_an_end_within_a_frame_is_malformed(pair: Pair) -> None:
    pair.peer.send(HELLO)
    pair.peer.shutdown(socket.SHUT_WR)
    assert len(pair.connection.receive(0.0)) == 1
    with pytest.raises(Ended):
        pair.connection.receive(0.0)
    other = Pair()
    other.peer.send(HELLO[:-1])
    other.peer.shutdown(socket.SHUT_WR)
    assert cut(other) == "malformed"
    other.connection.close()
    other.peer.close()


@pytest.mark.parametrize("data", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", b"\x02\0\0\0\x91\x01"])
def test_what_is_no_frame_is_malformed(pair: Pair, data: bytes) -> None:
    pair.peer.send(data)
    assert cut(pair) == "malformed"


def test_the_descriptor_of_the_first_bytes_is_handed_over(pair: Pair) -> None:
    arena, before = make_arena(1), descriptors()
    socket.send_fds(pair.peer, [HELLO], [arena])
    assert len(pair.connection.receive(0.0)) == 1
    taken = pair.connection.take_descriptor()
    assert taken is not None
    assert os.fstat(taken).st_ino == os.fstat(arena).st_ino
    assert not os.get_inheritable(taken)
    assert pair.connection.take_descriptor() is None
    os.close(taken)
    os.close(arena)
    assert descriptors() < before


@pytest.mark.parametrize("count", [2, 3, 200])
def test_more_descriptors_than_one_are_closed_and_their_sender_cut_off(pair: Pair, count: int) -> None:
    before = descriptors()
    socket.send_fds(pair.peer, [HELLO], [0] * count)
    assert cut(pair) == "foreign_descriptors"
    assert descriptors() == before


def test_a_descriptor_with_later_bytes_is_closed_and_its_sender_cut_off(pair: Pair) -> None:
    before = descriptors()
    pair.peer.send(HELLO)
    pair.connection.receive(0.0)
    socket.send_fds(pair.peer, [encode(m.Ask(1, 1))], [0])
    assert cut(pair) == "foreign_descriptors"
    assert descriptors() == before


def test_a_descriptor_that_nobody_took_is_closed_with_the_connection() -> None:
    before = descriptors()
    pair = Pair()
    socket.send_fds(pair.peer, [HELLO], [0])
    pair.connection.receive(0.0)
    pair.connection.close()
    pair.connection.close()
    pair.peer.close()
    assert descriptors() == before


def send_all(pair: Pair, message: m.Lend) -> None:
    while True:
        pair.connection.send(message)


def flood(pair: Pair, message: m.FromGuest | m.Verb, count: int, now: float) -> None:
    frame = encode(message)
    for _ in range(count):
        pair.peer.send(frame)
        pair.connection.receive(now)


def test_too_many_frames_at_once_are_flooding(pair: Pair) -> None:
    flood(pair, m.Ask(1, 1), int(ratelimits.FRAMES_BURST), now=0.0)
    pair.peer.send(encode(m.Ask(1, 1)))
    assert cut(pair) == "flooding"


def test_as_many_frames_as_are_allowed_go_on_for_ever(pair: Pair) -> None:
    for second in range(10):
        flood(pair, m.Ask(1, 1), int(ratelimits.FRAMES_PER_SECOND), now=float(second))


def test_verbs_count_for_more(pair: Pair) -> None:
    flood(pair, m.List(), int(ratelimits.FRAMES_BURST) // limits.VERB_FRAMES, now=0.0)
    pair.peer.send(encode(m.List()))
    assert cut(pair) == "flooding"


def test_what_does_not_fit_waits_and_is_sent_later_whole(pair: Pair) -> None:
    message = m.Lend(tuple((slab * 2, 1) for slab in range(4000)), 1)
    frame, sent = encode(message), 0
    while not pair.connection.queued_bytes:
        pair.connection.send(message)
        sent += 1
    pair.connection.send(message)
    sent += 1
    got = bytearray()
    while pair.connection.queued_bytes:
        got += pair.peer.recv(1 << 16)
        pair.connection.flush()
        pair.connection.check()
    while len(got) < sent * len(frame):
        got += pair.peer.recv(1 << 16)
    assert bytes(got) == frame * sent


def test_who_does_not_read_is_slow(pair: Pair) -> None:
    message = m.Lend(tuple((slab * 2, 1) for slab in range(4000)), 1)
    for _ in range(limits.MAX_QUEUED // len(encode(message))):
        pair.connection.send(message)
    with pytest.raises(CutOff, match="does not read"):
        send_all(pair, message)
    assert pair.connection.queued_bytes <= limits.MAX_QUEUED


def test_sending_to_who_has_gone_is_the_end(pair: Pair) -> None:
    pair.peer.close()
    with pytest.raises(Ended):
        pair.connection.send(m.Deny(1, "no"))
