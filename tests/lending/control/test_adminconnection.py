"""The connection of tmemctl: what tmemd said is heard although it has hung up."""

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
    """Give a connection whose other side has said something and is gone."""
    control = AdminConnection(path)
    connection, _ = listener.accept()
    with connection:
        connection.send(said)
    return control


def test_what_was_said_before_it_hung_up_is_the_answer(listener: socket.socket, tmp_path: Path) -> None:
    with hung_up(listener, tmp_path / "socket", encode(Done("frozen"))) as control:
        assert control.do(Freeze()) == "frozen"
    with (
        hung_up(listener, tmp_path / "socket", encode(Failed("too many connections"))) as control,
        pytest.raises(CommandError, match="too many connections"),
    ):
        control.do(Freeze())


def test_who_tells_other_sums_is_no_tmemd_of_ours(listener: socket.socket, tmp_path: Path) -> None:
    with (
        hung_up(listener, tmp_path / "socket", encode(Totals({"size": 1}))) as control,
        pytest.raises(CommandError, match="is it tmemd of this version"),
    ):
        control.totals()


def test_who_hangs_up_without_a_word_is_told_by_that(listener: socket.socket, tmp_path: Path) -> None:
    with (
        hung_up(listener, tmp_path / "socket", b"") as control,
        pytest.raises(CommandError, match="hung up: look into its log"),
    ):
        control.do(Freeze())
