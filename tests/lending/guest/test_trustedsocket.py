"""Nothing is sent to a listener of another user, nor to one in a directory in which others may write."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SECONDS
from tests.lending.otheruser import OTHER_UID
from tmem.lending.control.adminconnection import AdminConnection
from tmem.lending.guest.borrowedarena import BorrowedArena
from tmem.lending.guest.handshake import Unreachable, register
from tmem.lending.guest.trustedsocket import Untrusted, connect, parse_user
from tmem.lending.protocol.messages import VERSION, Hello
from tmemcommon.sizes import ConfigError

HELLO = Hello(VERSION, b"t" * 16, "/mnt", 64)


class Impostor:
    """A socket that another user than this test listens on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.settimeout(SECONDS)
        self.listener.bind(os.fspath(path))
        os.seteuid(OTHER_UID)
        try:
            self.listener.listen()
        finally:
            os.seteuid(0)

    def hears(self) -> bytes:
        """Accept a connection and return all that is sent over it."""
        with self.listener.accept()[0] as connection:
            connection.settimeout(SECONDS)
            data, fds, _, _ = socket.recv_fds(connection, 65536, 1)
            assert not fds
            return data


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostor]:
    made = Impostor(tmp_path / "socket")
    yield made
    made.listener.close()


@pytest.fixture
def arena() -> Iterator[int]:
    source = BorrowedArena(64)
    yield source.fd
    source.close()


@pytest.mark.root
def test_a_guest_sends_nothing_to_another_users_listener(impostor: Impostor, arena: int) -> None:
    with pytest.raises(Unreachable, match=f"user {OTHER_UID} listens there"):
        register(os.fspath(impostor.path), [HELLO], arena)
    assert impostor.hears() == b""


@pytest.mark.root
def test_tmemctl_sends_nothing_to_another_users_listener(impostor: Impostor) -> None:
    with pytest.raises(ConfigError, match=f"--owner {OTHER_UID} if that user is meant"):
        AdminConnection(impostor.path)
    assert impostor.hears() == b""
    with AdminConnection(impostor.path, OTHER_UID):
        pass


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775], ids=oct)
def test_a_socket_where_others_may_write_is_not_used(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(os.fspath(directory / "socket"))
        listener.listen()
        (tmp_path / "link").symlink_to(directory / "socket")
        directory.chmod(mode)
        for path in (directory / "socket", tmp_path / "link"):
            with pytest.raises(Untrusted, match="take the socket's place"):
                connect(client, os.fspath(path))
        directory.chmod(0o755)
        connect(client, os.fspath(tmp_path / "link"))


@pytest.mark.root
def test_a_socket_of_another_user_is_used_only_if_that_user_is_named(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        os.chown(tmp_path, OTHER_UID, -1)
        with pytest.raises(Untrusted, match="belongs to user") as untrusted:
            connect(client, path)
        assert untrusted.value.remedy("--owner") == f"give --owner {OTHER_UID} if that user is meant"
        connect(client, path, OTHER_UID)


def test_an_owner_is_a_name_or_a_number() -> None:
    assert parse_user("root") == parse_user("0") == 0
    with pytest.raises(ConfigError, match="does not exist"):
        parse_user("nobody-of-that-name")
