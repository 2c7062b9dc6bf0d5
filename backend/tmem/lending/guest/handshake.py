"""Registers with tmemd: sends the greeting and the memfd, and waits for the answer.

The calls block, and each wait is bounded. They run before a mount reports success, and in a thread to reconnect.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from tmem.lending.guest.trustedsocket import connect
from tmem.lending.protocol.messages import Evicted, FromGuest, Refused, ToGuest, Welcome
from tmem.lending.protocol.wire import Decoder, ProtocolError, encode, guest_decoder

ANSWER_SECONDS = 30.0  # generous, for a busy machine
CHUNK = 65536
_ENDED = "it closed the connection without an answer"


class Unreachable(Exception):
    """No tmemd answers; the message is a short reason."""


class Declined(Exception):
    """tmemd refused this guest; the message is its reason. `retry`: it may accept the guest later."""

    def __init__(self, reason: str, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


class WasEvicted(Declined):
    """tmemd has evicted this guest and freed what it held."""


class Registered:
    """An accepted connection, and the messages that came with the Welcome."""

    def __init__(self, connection: socket.socket, decoder: Decoder[ToGuest], messages: list[ToGuest]) -> None:
        self.connection = connection
        self.decoder = decoder
        welcome, *self.messages = messages
        if isinstance(welcome, Refused):
            raise Declined(welcome.reason, welcome.retry)
        if isinstance(welcome, Evicted):
            raise WasEvicted(welcome.reason, retry=False)
        if not isinstance(welcome, Welcome):
            raise Unreachable(f"it answers {type(welcome).__name__}: it is not a tmemd of this version")
        self.welcome = welcome


def register(path: str, greeting: Sequence[FromGuest], memfd: int, owner: int | None = None) -> Registered:
    """Connect to a tmemd of root, this user or the owner, and register. Raises Unreachable or Declined."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER_SECONDS)
        connect(connection, path, owner)
        frames = b"".join(map(encode, greeting))
        # A tmemd that refuses may close its end before it has read all; its answer can still be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = socket.send_fds(connection, [frames], [memfd])
            connection.sendall(frames[sent:])
        return _answer(connection)
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            raise Unreachable("it does not answer") from error
        if isinstance(error, ConnectionResetError):
            raise Unreachable(_ENDED) from error
        if isinstance(error, OSError):
            raise Unreachable(error.strerror or os.strerror(error.errno or 0) or str(error)) from error
        if isinstance(error, ProtocolError):
            raise Unreachable(f"it does not speak this protocol: {error}") from error
        raise


def _answer(connection: socket.socket) -> Registered:
    decoder = guest_decoder()
    messages: list[ToGuest] = []
    while not messages:
        data = connection.recv(CHUNK)
        if not data:
            raise Unreachable(_ENDED)
        messages = decoder.feed(data)
    return Registered(connection, decoder, messages)
