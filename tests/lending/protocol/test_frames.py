"""A million frames that are nearly right: each is a message within its bounds or an error, and nothing else."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest

from tmem.lending.protocol import messages as m
from tmem.lending.protocol.messages import Message
from tmem.lending.protocol.wire import MAX_FRAME, ProtocolError, encode, guest_decoder, tmemctl_decoder, tmemd_decoder

FRAMES = 1_000_000
_ROW = m.Row(1, "/m", 0, 1, "connected", 9, 1, 2, 1.0, 9, 0, 4, None, 1, 2, 3, 4, 5, 6, 7)
SAMPLES: tuple[Message, ...] = (
    m.Hello(m.VERSION, bytes(16), "/mnt/one", 4096, None, True),
    *(m.Claim(((0, 5), (9, 1)), True, False), m.Ask(1, 64, False, 3.5), m.Return(((3, 2),), False, 9, True, 1.0)),
    *(m.Confirm(70_000), m.Report(0.5, 1, 2, 3, 4, 5, 6), m.Welcome(1, 9, 4), m.Refused("no", True)),
    *(m.Lend(((0, 64),), 1), m.Deny(1, "cap"), m.Revoke(3, 32), m.Taken(((1, 1),), 4), m.Limits(9, 0, True)),
    *(m.List(), m.SetLimits("/m", 2.0, 5, None, 0), m.Freeze("7"), m.Thaw(), m.TakeBack("7", 3, True), m.Drain("7")),
    *(m.Resize(5), m.AskTotals(), m.Table((_ROW, _ROW), True), m.Done("ok"), m.Failed("no"), m.Totals({"a": 1})),
)


def spoilt(chance: random.Random, frame: bytes) -> bytes:
    """Change a frame a little: bytes, bits, its end, its length, or a piece of another."""
    data = bytearray(frame)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(len(data)) if data else 0
        match chance.randrange(7):
            case 0 | 1 if data:
                data[place] = chance.randrange(256)
            case 2 if data:
                data[place] ^= 1 << chance.randrange(8)
            case 3:
                del data[place : place + chance.randint(1, 4)]
            case 4:
                data[place:place] = chance.randbytes(chance.randint(1, 9))
            case 5:
                data[place:place] = encode(chance.choice(SAMPLES))[4:]
            case _:
                body = data[4:]
                data[:4] = len(body).to_bytes(4, "little")
    return bytes(data)


def fuzz(seed: int, frames: int) -> Counter[str]:
    """Feed frames to the decoders; give what became of them."""
    chance, found = random.Random(seed), Counter[str]()
    encoded = [encode(sample) for sample in SAMPLES]
    makers = (tmemd_decoder, tmemd_decoder, guest_decoder, tmemctl_decoder)
    for _ in range(frames):
        decoder = chance.choice(makers)()
        try:
            messages = decoder.feed(spoilt(chance, chance.choice(encoded)))
        except ProtocolError:
            found["refused"] += 1
            continue
        found["unfinished" if decoder.buffered else "whole"] += 1
        assert decoder.buffered <= MAX_FRAME + 4
        for message in messages:
            found["messages"] += 1
            # Whatever was let through is within its bounds, also when it is checked anew.
            assert msgspec.convert(msgspec.to_builtins(message), type(message)) == message
    return found


def test_twenty_thousand_spoilt_frames_are_messages_or_errors() -> None:
    found = fuzz(1, 20_000)
    assert all(found[what] for what in ("refused", "unfinished", "whole", "messages"))


@pytest.mark.slow
def test_a_million_spoilt_frames_are_messages_or_errors() -> None:
    found = fuzz(2, FRAMES)
    print(dict(found))
    assert found["refused"] + found["unfinished"] + found["whole"] == FRAMES
