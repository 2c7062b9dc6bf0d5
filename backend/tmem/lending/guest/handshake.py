"""Find tmemd and register with it: the memfd goes with the first byte, the answer is Welcome or a reason.

Blocking, with a bound on every wait: done before a mount reports success, and from a thread when tmemd was lost.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from tmem.lending.guest.trustedsocket import connect
from tmem.lending.protocol.messages import Evicted, FromGuest, Refused, ToGuest, Welcome
from tmem.lending.protocol.wire import Decoder, ProtocolError, encode, guest_decoder

ANSWER_SECONDS = 30.0  # that a tmemd has which is there, on a busy machine
CHUNK = 65536
_ENDED = "it ended the connection without an answer"


class Unreachable(Exception):
    """No tmemd answers; the reason in a few words."""


class Declined(Exception):
    """tmemd does not want us; its reason in one line. `retry` says that it may later."""

    def __init__(self, reason: str, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


class WasEvicted(Declined):
    """tmemd has freed what we held, and does not want us any more."""


class Registered:
    """A connection that was welcomed, and what came behind the Welcome."""

    def __init__(self, connection: socket.socket, decoder: Decoder[ToGuest], messages: list[ToGuest]) -> None:
        self.connection = connection
        self.decoder = decoder
        welcome, *self.messages = messages
        if isinstance(welcome, Refused):
            raise Declined(welcome.reason, welcome.retry)
        if isinstance(welcome, Evicted):
            raise WasEvicted(welcome.reason, retry=False)
        if not isinstance(welcome, Welcome):
            raise Unreachable(f"it answers {type(welcome).__name__}: not a tmemd of our version")
        self.welcome = welcome


def register(path: str, greeting: Sequence[FromGuest], memfd: int, owner: int | None = None) -> Registered:
    """Connect to tmemd, root's, ours or the owner's, and send the greeting; raise Unreachable or Declined."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER_SECONDS)
        connect(connection, path, owner)
        frames = b"".join(map(encode, greeting))
        # Who declines need not read the greeting to its end: its answer is there although nothing more can be sent.
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
            raise Unreachable(f"it does not speak our language: {error}") from error
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
