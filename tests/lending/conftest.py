"""Fixtures: a tmemd that checks itself, and guests that speak to it; all of them end with the test."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lending.fakeguest import FakeGuest
from tests.lending.mounts import Borrowing
from tests.lending.tmemd import Tmemd

MakeGuest = Callable[..., FakeGuest]
MakeBorrowing = Callable[..., Borrowing]


@pytest.fixture
def tmemd() -> Iterator[Tmemd]:
    """Return a tmemd that the test starts."""
    directory = Path(tempfile.mkdtemp(prefix="tmemd-test-"))
    directory.chmod(0o755)
    made = Tmemd(directory)
    try:
        yield made
        made.stop()
    finally:
        if made.process is not None:
            made.kill()
        shutil.rmtree(directory)


@pytest.fixture
def guest(tmemd: Tmemd) -> Iterator[MakeGuest]:
    """Return a factory of guests; it takes the arguments of FakeGuest."""
    made: list[FakeGuest] = []

    def make(*arguments: object, **named: object) -> FakeGuest:
        made.append(FakeGuest(tmemd.socket, *arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            with contextlib.suppress(OSError):
                one.close()


@pytest.fixture
def borrowing(tmemd: Tmemd, tmp_path: Path) -> Iterator[MakeBorrowing]:
    """Return a factory of mounts that borrow; it takes a name and the MiB of the mount's file."""
    made: list[Borrowing] = []

    def make(name: str, mib: int = 4) -> Borrowing:
        made.append(Borrowing(tmp_path / name, tmemd, mib))
        return made[-1]

    try:
        yield make
        for one in made:
            one.end()
    finally:
        for one in made:
            one.clean()
