"""The documents name every option and counter, the README is short, and links lead somewhere."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tmem.lending.control.tmemctl import command as tmemctl
from tmem.lending.daemon.tmemd import command as tmemd
from tmem.lending.lender.stats import Counters, LenderStats
from tmemfs.cli import cli as tmemfs
from tmemfs.config import MIB, BalloonRange, MountConfig
from tmemfs.guest import Guest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
MANUALS = {"tmemfs": (tmemfs, "usage.md"), "tmemd": (tmemd, "tmemd.md"), "tmemctl": (tmemctl, "tmemd.md")}


def options(command: click.Command) -> Iterator[str]:
    """Yield the long options of a command and of those below it, and the names of these."""
    for parameter in command.params:
        yield from (name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--"))
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield name
            yield from options(child)


@pytest.mark.parametrize("program", MANUALS)
def test_the_manual_names_every_command_and_option(program: str) -> None:
    command, manual = MANUALS[program]
    text = (ROOT / "docs" / manual).read_text()
    missing = [name for name in options(command) if not re.search(rf"`[^`]*{re.escape(name)}\b", text)]
    assert missing == []


@pytest.mark.parametrize("lender", [None, "/nowhere.sock"], ids=["own pool", "borrowed pool"])
def test_the_manual_names_every_counter_of_a_mount(tmp_path: Path, lender: str | None) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mnt"
    source.mkdir()
    mountpoint.mkdir()
    config = MountConfig(
        source,
        mountpoint,
        pool_socket=lender,
        hswap_bytes=MIB,
        hswap_overflow=tmp_path / "overflow",
        balloon=BalloonRange(MIB, 2 * MIB),
        writeback=True,
        watch=True,
    )
    guest = Guest(config, os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        names = [name for name in guest.stats.snapshot() if not name.startswith("request_")]
    finally:
        guest.close()
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert names
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_manual_names_every_counter_of_tmemd() -> None:
    fields = [field.name for kind in (LenderStats, Counters) for field in dataclasses.fields(kind)]
    names = [name for name in fields if name != "counters" and not name.startswith(("denied_", "refused_"))]
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for name in (*names, "denied_*", "refused_*", "refused_claim_slabs") if f"`{name}`" not in text] == []


def test_the_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }
