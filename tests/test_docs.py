"""The documents name every option and counter, the README is short, and links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.conftest import SECONDS, environment
from tests.lending.conftest import tmemd  # noqa: F401 (a fixture)
from tests.lending.tmemd import Tmemd
from tmem.lending.control.tmemctl import command as tmemctl
from tmem.lending.daemon.tmemd import command as tmemd_command
from tmemcommon.sizes import MIB
from tmemfs.cli import cli as tmemfs
from tmemfs.config import BalloonRange, MountConfig
from tmemfs.guest import Guest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
MANUALS = {"tmemfs": (tmemfs, "usage.md"), "tmemd": (tmemd_command, "tmemd.md"), "tmemctl": (tmemctl, "tmemd.md")}


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


def test_the_manual_names_every_counter_of_tmemd(tmemd: Tmemd) -> None:  # noqa: F811
    tmemd.start()
    shown = subprocess.run(
        (sys.executable, "-m", "tmem.lending.control.tmemctl", "--socket", tmemd.socket, "stats", "--json"),
        env=environment(),
        check=True,
        capture_output=True,
        timeout=SECONDS,
    )
    text = (ROOT / "docs" / "metrics.md").read_text()
    groups = ("denied_", "refused_", "cut_off_")
    assert all(f"`{group}*`" in text for group in groups)
    names = [name for name in json.loads(shown.stdout) if not name.startswith(groups) or name == "refused_claim_slabs"]
    assert [name for name in names if f"`{name}`" not in text] == []


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


def test_the_overview_lists_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "design" / "overview.md").read_text()
    listed = set(re.findall(r"\b(\w+)\.py\b", text[text.index("## Modules") : text.index("## Control socket")]))
    present = {path.stem for folder in ("tmemfs", "backend") for path in (ROOT / folder).rglob("*.py")}
    assert listed - present - {"catalogue", "test_layers"} == set()
    assert {name for name in present if not name.startswith("__")} - listed == set()
