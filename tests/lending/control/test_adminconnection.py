"""tmemctl reads the last answer of a tmemd that has hung up, and rejects unexpected ones."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.lending.control.adminconnection import AdminConnection
from tmem.lending.protocol.messages import Done, Failed, Freeze, Totals
from tmem.lending.protocol.wire import encode
from tmemcommon.commandline import CommandError


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(os.fspath(tmp_path / "socket"))
        made.listen()
        yield made


def hung_up(listener: socket.socket, path: Path, said: bytes) -> AdminConnection:
    """Return a connection whose other side has sent something and closed."""
    control = AdminConnection(path)
    connection, _ = listener.accept()
    with connection:
        connection.send(said)
    return control


def test_an_answer_sent_before_the_hang_up_is_read(listener: socket.socket, tmp_path: Path) -> None:
    with hung_up(listener, tmp_path / "socket", encode(Done("frozen"))) as control:
        assert control.execute(Freeze()) == "frozen"
    with (
        hung_up(listener, tmp_path / "socket", encode(Failed("too many connections"))) as control,
        pytest.raises(CommandError, match="too many connections"),
    ):
        control.execute(Freeze())


def test_totals_without_the_needed_counters_are_refused(listener: socket.socket, tmp_path: Path) -> None:
    with (
        hung_up(listener, tmp_path / "socket", encode(Totals({"size": 1}))) as control,
        pytest.raises(CommandError, match="is it a tmemd of this version"),
    ):
        control.totals()


def test_a_hang_up_without_an_answer_is_an_error(listener: socket.socket, tmp_path: Path) -> None:
    with (
        hung_up(listener, tmp_path / "socket", b"") as control,
        pytest.raises(CommandError, match="hung up: see its log"),
    ):
        control.execute(Freeze())
