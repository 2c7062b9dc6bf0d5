"""Fixtures of the mount tests."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Place
from tests.mounted import VARIANTS, Mounted, mounting


@pytest.fixture
def mounted(place: Place) -> Iterator[Mounted]:
    """Yield a mount to start; it is ended and checked at teardown."""
    with mounting(place) as made:
        yield made


@pytest.fixture(params=["through", "writeback", "threads"])
def variant(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the options of each kind of mount in turn."""
    return VARIANTS[request.param]


@pytest.fixture(params=["through", "writeback"])
def writing(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the options of write-through and write-back."""
    return VARIANTS[request.param]


@pytest.fixture
def tree(mounted: Mounted) -> Path:
    """Copy real files, links and directories into the source."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("json", "email", "encodings", "unittest", "xml"):
        shutil.copytree(library / name, mounted.source / name, ignore=shutil.ignore_patterns("__pycache__"))
    large = mounted.source / "large"
    with large.open("wb") as file:
        for path in sorted(library.glob("*.py"))[:120]:
            file.write(path.read_bytes())
    (mounted.source / "empty").touch()
    (mounted.source / "link").symlink_to("json/decoder.py")
    (mounted.source / "dangling").symlink_to("nowhere")
    (mounted.source / "hard").hardlink_to(mounted.source / "json" / "decoder.py")
    (mounted.source / "private").mkdir(mode=0o700)
    (mounted.source / "private" / "script").write_text("#!/bin/sh\n")
    (mounted.source / "private" / "script").chmod(0o750)
    return mounted.source
