"""The protocol, byte by byte, and what comes of bytes that no honest peer sends."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lending.protocol import samples
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.messages import Answer, FromGuest, Message, ToGuest, Verb
from tmem.lending.protocol.runs import MAX_RUNS
from tmem.lending.protocol.wire import (
    MAX_FRAME,
    ProtocolError,
    WireMisuse,
    encode,
    guest_decoder,
    tmemctl_decoder,
    tmemd_decoder,
)

TOKEN = bytes(range(16))
BYTES: list[tuple[Message, str]] = [
    (m.Hello(1, TOKEN, "/m", 4096, 0), "1d000000 97 01 01 c410" + TOKEN.hex() + "a22f6d cd1000 00 c2"),
    (m.Claim(((0, 2), (5, 1)), True, False), "0b000000 94 02 92920002920501 c3 c2"),
    (m.Ask(7, 16), "06000000 95 03 07 10 c2 c0"),
    (m.Return(((3, 1),), False, 9), "0a000000 96 04 91920301 c2 09 c3 c0"),
    (m.Confirm(258), "05000000 92 05 cd0102"),
    (m.Report(0.5, 1, 2, 3, 4, 5, 6), "11000000 98 06 cb3fe0000000000000 01 02 03 04 05 06"),
    (m.Welcome(1, 2, 3), "06000000 95 20 01 02 03 c2"),
    (m.Refused("no"), "06000000 93 21 a26e6f c2"),
    (m.Lend(((0, 16),), 7), "09000000 95 22 91920010 07 c2 c3"),
    (m.Deny(7, "cap"), "07000000 93 23 07 a3636170"),
    (m.Revoke(1, 64), "05000000 94 24 01 40 c2"),
    (m.Taken(((1, 1),), 2), "07000000 93 25 91920101 02"),
    (m.Limits(9, 0, True), "05000000 94 26 09 00 c3"),
    (m.List(), "02000000 91 40"),
    (m.Resize(1), "03000000 92 46 01"),
    (m.Done(), "03000000 92 61 a0"),
]


def decode(message: Message, data: bytes) -> list[FromGuest | Verb] | list[ToGuest] | list[Answer]:
    """Decode as the side does that may get such a message."""
    if isinstance(message, ToGuest):
        return guest_decoder().feed(data)
    if isinstance(message, Answer):
        return tmemctl_decoder().feed(data)
    return tmemd_decoder().feed(data)


def frame(value: object) -> bytes:
    body = msgspec.msgpack.encode(value)
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(("message", "text"), BYTES, ids=lambda value: type(value).__name__)
def test_a_message_is_these_bytes(message: Message, text: str) -> None:
    data = bytes.fromhex(text.replace(" ", ""))
    assert encode(message) == data
    assert decode(message, data) == [message]


@given(st.one_of(samples.from_guest, samples.verbs, samples.to_guest, samples.answers))
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(message, encode(message)) == [message]


@given(st.lists(samples.from_guest, max_size=8), st.randoms(use_true_random=False))
def test_a_stream_may_be_cut_anywhere(sent: list[FromGuest], chance: random.Random) -> None:
    stream, decoder, got = b"".join(map(encode, sent)), tmemd_decoder(), []
    while stream:
        count = chance.randint(1, 40)
        got += decoder.feed(stream[:count])
        stream = stream[count:]
    decoder.end()
    assert got == sent
    assert decoder.buffered == 0


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_refused_before_anything_is_kept(length: int) -> None:
    decoder = tmemd_decoder()
    with pytest.raises(ProtocolError):
        decoder.feed(length.to_bytes(4, "little"))
    assert decoder.buffered == 0
    with pytest.raises(WireMisuse):
        decoder.feed(b"")


def test_an_unfinished_frame_is_an_error_only_at_the_end() -> None:
    decoder = tmemd_decoder()
    assert decoder.feed(encode(m.List())[:-1]) == []
    with pytest.raises(ProtocolError):
        decoder.end()


@pytest.mark.parametrize(
    "value",
    [
        pytest.param([3, 0, 16, False], id="a serial of 0"),
        pytest.param([3, 1, 0, False], id="an Ask for nothing"),
        pytest.param([3, 1, m.MAX_ASK + 1, False], id="an Ask for too much"),
        pytest.param([3, 1, 1.5, False], id="a part of a slab"),
        pytest.param([3, 1, 1, 1], id="a number for a bool"),
        pytest.param([3, 1, 1, False, None, 0], id="a field too many"),
        pytest.param([3, 1], id="a field too few"),
        pytest.param([99, 1], id="a tag of another side"),
        pytest.param([7], id="an unknown tag"),
        pytest.param({"serial": 1}, id="a map"),
        pytest.param(None, id="nil"),
        pytest.param([4, [[5, 1], [4, 1]], False, 0, True], id="runs that descend"),
        pytest.param([4, [[0, 2], [1, 1]], False, 0, True], id="runs that overlap"),
        pytest.param([4, [[0, 0]], False, 0, True], id="an empty run"),
        pytest.param([4, [[-1, 1]], False, 0, True], id="a negative slab"),
        pytest.param([4, [[m.MAX_SLABS - 1, 2]], False, 0, True], id="a run beyond any arena"),
        pytest.param([4, [[2 * n, 1] for n in range(MAX_RUNS + 1)], False, 0, True], id="too many runs"),
        pytest.param([6, float("nan"), 0, 0, 0, 0, 0, 0], id="an age that is no number"),
        pytest.param([6, -1.0, 0, 0, 0, 0, 0, 0], id="a negative age"),
        pytest.param([6, float("inf"), 0, 0, 0, 0, 0, 0], id="an endless age"),
        pytest.param([6, 0.0, 0, 0, 1 << 63, 0, 0], id="a counter beyond 63 bits"),
        pytest.param([1, 1, b"short", "/m", 1, None, False], id="a short token"),
        pytest.param([1, 1, TOKEN, "/m", 0, None, False], id="an arena of nothing"),
        pytest.param([1, 1, TOKEN, "/m", m.MAX_SLABS + 1, None, False], id="an arena too large"),
        pytest.param([1, 1, TOKEN, "", 1, None, False], id="no name"),
        pytest.param([1, 1, TOKEN, "x" * 513, 1, None, False], id="a long name"),
        pytest.param([65, "g", 0.0, None, None, None], id="no weight"),
    ],
)
def test_a_field_out_of_bounds_is_the_peers_error(value: object) -> None:
    with pytest.raises(ProtocolError):
        tmemd_decoder().feed(frame(value))


@pytest.mark.parametrize(
    "body", [b"\xc1", b"\x91", b"\x93\x03\x01", b"\xa5\xff\xfe\xfd\xfc\xfb", b"\x91" * 60000, b"\x92\x05\x01\x00"]
)
def test_invalid_msgpack_is_the_peers_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        tmemd_decoder().feed(len(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(m.Totals({f"{number:0512}": number for number in range(512)}), id="a frame too long"),
        pytest.param(m.Ask(0, 1), id="a serial of 0"),
        pytest.param(m.Ask(1, m.MAX_ASK + 1), id="an Ask for too much"),
        pytest.param(m.Lend(((5, 0),), 1), id="an empty run"),
        pytest.param(m.Return(tuple((2 * n, 1) for n in range(MAX_RUNS + 1))), id="too many runs"),
        pytest.param(m.Report(m.MAX_SECONDS * 2, *[0] * 6), id="an age beyond its bound"),
        pytest.param(m.SetLimits("x" * (m.MAX_TEXT + 1)), id="a long name"),
        pytest.param(m.Freeze("\udcff"), id="a name that is no text"),
        pytest.param(m.Resize(1 << 64), id="a number beyond 64 bits"),
    ],
)
def test_an_invalid_message_is_not_sent(message: Message) -> None:
    with pytest.raises(WireMisuse):
        encode(message)


@pytest.mark.parametrize("make", [m.Refused, m.Done, m.Failed, lambda line: m.Deny(1, line)])
def test_a_line_for_a_person_is_shortened_and_keeps_its_remedy(make: Callable[[str], ToGuest | Answer]) -> None:
    message = make(f"there is no guest /{'𝄞' * 70_000}: tmemctl list shows them")
    assert decode(message, encode(message)) == [message]
    assert isinstance(message, m.Refused | m.Done | m.Failed | m.Deny)
    line = message.text if isinstance(message, m.Done) else message.reason
    assert len(line) == m.MAX_TEXT
    assert line.startswith("there is no guest /")
    assert line.endswith(": tmemctl list shows them")


def test_a_mountpoint_of_any_length_and_bytes_has_a_name() -> None:
    for mountpoint in ("/mnt/a", "/" + "d" * 4000, "/\udcff"):
        encode(m.Freeze(m.guest_name(mountpoint)))
    assert m.guest_name("/mnt/a") == "/mnt/a"
    assert m.guest_name("/" + "d" * 4000 + "/end").endswith("d/end")


def test_an_invalid_message_of_ours_is_not_a_protocol_error() -> None:
    with pytest.raises(ValueError, match="overlap"):
        m.Return(((0, 2), (1, 1)))


def test_the_longest_runs_fit_into_a_frame() -> None:
    runs = tuple((m.MAX_SLABS - 2 * (MAX_RUNS - n), 1) for n in range(MAX_RUNS))
    assert len(encode(m.Return(runs))) <= MAX_FRAME + 4


def test_the_longest_table_fits_into_a_frame() -> None:
    big = (1 << 63) - 1
    ours = (1 << 31, "𝄞" * m.MAX_TEXT, 1, 1, "frozen", *[m.MAX_SLABS] * 3, 1.0, *[m.MAX_SLABS] * 3, 1.0, *[big] * 7)
    row = msgspec.convert(ours, m.Row)
    assert len(encode(m.Table((row,) * m.MAX_ROWS, True))) <= MAX_FRAME + 4
