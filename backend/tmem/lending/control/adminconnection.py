"""tmemctl's connection to tmemd: one verb at a time, each with its answer."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

from tmem.lending.guest.trustedsocket import Untrusted, connect
from tmem.lending.protocol.messages import Answer, AskTotals, Done, Failed, List, Row, Table, Totals, Verb
from tmem.lending.protocol.wire import ProtocolError, encode, tmemctl_decoder
from tmemcommon.commandline import CommandError
from tmemcommon.sizes import ConfigError

_ANSWER_SECONDS = 30.0
_READ = 1 << 16
# The counters that tmemctl uses; it prints the others as they are.
_NEEDED = {
    *("size_bytes", "ephemeral_bytes", "persistent_bytes", "promised_bytes", "reserved_bytes"),
    *("guests", "connected"),
}


class AdminConnection:
    """A connection to tmemd. Raises ConfigError if it cannot connect, CommandError if tmemd refuses a verb."""

    def __init__(self, path: Path, owner: int | None = None) -> None:
        """Connect to the tmemd at `path`, if root, this user or `owner` listens there."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_ANSWER_SECONDS)
        self._decoder = tmemctl_decoder()
        self._arrived: list[Answer] = []
        try:
            connect(self._socket, os.fspath(path), owner)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            self._socket.close()
            raise ConfigError(
                f"tmemd does not listen on '{path}': start it with tmemd --size SIZE --socket {path},"
                " or name its socket with --socket"
            ) from None
        except Untrusted as error:
            self._socket.close()
            raise ConfigError(f"socket '{path}' is not used: {error.strerror}: {error.remedy('--owner')}") from None
        except OSError as error:
            self._socket.close()
            reason = "you may not use it" if isinstance(error, PermissionError) else error.strerror or str(error)
            raise ConfigError(f"socket '{path}' cannot be connected to: {reason}; name another with --socket") from None

    def __enter__(self) -> AdminConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def rows(self) -> list[Row]:
        """Return the guests that this user may see."""
        self._send(List())
        rows: list[Row] = []
        while True:
            answer = self._answer()
            if not isinstance(answer, Table):
                raise self._unexpected()
            rows += answer.rows
            if answer.last:
                return rows

    def totals(self) -> dict[str, int | float]:
        """Return the sums and counters."""
        self._send(AskTotals())
        answer = self._answer()
        if not isinstance(answer, Totals) or not _NEEDED.issubset(answer.counters):
            raise self._unexpected()
        return answer.counters

    def execute(self, verb: Verb) -> str:
        """Send a verb that changes something; return tmemd's answer, which may be empty."""
        self._send(verb)
        answer = self._answer()
        if not isinstance(answer, Done):
            raise self._unexpected()
        return answer.text

    def _send(self, verb: Verb) -> None:
        try:
            self._socket.sendall(encode(verb))
        except (BrokenPipeError, ConnectionResetError):
            pass  # its last answer can still be read
        except OSError as error:
            raise self._failed(error) from None

    def _answer(self) -> Table | Done | Totals:
        """Wait for one answer. Raise CommandError if it is a refusal."""
        answer = self._next()
        if isinstance(answer, Failed):
            raise CommandError(answer.reason)
        return answer

    def _next(self) -> Table | Done | Totals | Failed:
        while not self._arrived:
            try:
                data = self._socket.recv(_READ)
                self._arrived += self._decoder.feed(data)
            except ConnectionResetError:
                data = b""
            except (OSError, ProtocolError) as error:
                raise self._failed(error) from None
            if not data:
                raise CommandError(f"tmemd on '{self._path}' hung up: see its log for the reason")
        return self._arrived.pop(0)

    def _failed(self, error: Exception) -> CommandError:
        reason = f"none within {_ANSWER_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error)
        return CommandError(f"tmemd on '{self._path}' gives no answer: {reason}")

    def _unexpected(self) -> CommandError:
        return CommandError(f"'{self._path}' sent an unexpected answer: is it a tmemd of this version?")
