"""tmemctl: shows what tmemd lends to whom, and changes it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.live import Live

from tmem.arena import SLAB_SIZE
from tmem.lending.control.adminconnection import AdminConnection
from tmem.lending.control.tables import as_json, render
from tmem.lending.daemon.socketfile import likely_path
from tmem.lending.guest.trustedsocket import parse_user
from tmem.lending.protocol.messages import (
    MAX_SLABS,
    MAX_WEIGHT,
    MIN_WEIGHT,
    Drain,
    Evict,
    Freeze,
    Resize,
    SetLimits,
    TakeBack,
    Thaw,
    Verb,
    guest_name,
)
from tmemcommon.commandline import DURATION, Text, run
from tmemcommon.sizes import ConfigError, check_ram, format_size, parse_size
from tmemcommon.texts import printable

_WIDE = 200  # columns if the output is not a terminal


def parse_slabs(text: str) -> int:
    """Parse a size into slabs, at least one."""
    slabs = max(1, parse_size(text) // SLAB_SIZE)
    if slabs > MAX_SLABS:
        raise ConfigError(f"size '{text}' is too large: give at most {format_size(MAX_SLABS * SLAB_SIZE)}")
    return slabs


def parse_limit(text: str) -> int:
    """Parse a size that may be zero into slabs."""
    return 0 if text.strip() == "0" else parse_slabs(text)


def parse_weight(text: str) -> float:
    """Parse a guest's weight."""
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise ConfigError(f"weight '{text}' is not understood: write a number, {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight


def parse_guest(text: str) -> str:
    """Parse a guest's number or its mountpoint, which may be a relative path."""
    if not text:
        raise ConfigError("no guest is named: give a number or a mountpoint that tmemctl list shows")
    return guest_name(text if text.isdecimal() else os.path.abspath(text))


SLABS = Text("SIZE", parse_slabs)
LIMIT = Text("SIZE", parse_limit)
WEIGHT = Text("WEIGHT", parse_weight)
GUEST = Text("GUEST", parse_guest)
USER = Text("USER", parse_user)
guest_argument = click.argument("guest", type=GUEST)
all_argument = click.argument("guest", type=GUEST, required=False)
json_option = click.option("--json", "as_text", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    default=None,
    help="Where tmemd listens. [default: this user's own, else /run/tmemd.sock]",
)
@click.option("--owner", type=USER, default=None, help="Who runs that tmemd, if it is neither root nor you.")
@click.version_option(package_name="tmemfs", prog_name="tmemctl")
@click.pass_context
def command(context: click.Context, path: str | None, owner: int | None) -> None:
    """Show what tmemd lends to whom, and change it. A GUEST is a number or a mountpoint of the list."""
    context.obj = lambda: context.with_resource(
        AdminConnection(Path(path) if path is not None else likely_path(), owner)
    )


Connect = Callable[[], AdminConnection]


@command.command("list")
@json_option
@click.pass_obj
def list_command(connect: Connect, as_text: bool) -> int:
    """Show the guests and what they hold."""
    control = connect()
    rows = control.rows()
    if as_text:
        print(json.dumps([as_json(row) for row in rows], indent=2))
    else:
        console = _console()
        console.print(render(rows, control.totals(), console, all_rows=True))
    return 0


@command.command("set")
@guest_argument
@click.option("--weight", type=WEIGHT, help="Share when memory is short; 1 at first.")
@click.option("--cap", type=LIMIT, help="Most that it may hold.")
@click.option("--floor", type=LIMIT, help="Least that it keeps.")
@click.option("--persistent-cap", type=LIMIT, help="Most that it may hold for its hswap.")
@click.pass_obj
def set_command(
    connect: Connect,
    guest: str,
    weight: float | None,
    cap: int | None,
    floor: int | None,
    persistent_cap: int | None,
) -> int:
    """Change the limits of a guest."""
    if weight is cap is floor is persistent_cap is None:
        raise ConfigError("nothing to set: give --weight, --cap, --floor or --persistent-cap")
    return _execute(connect, SetLimits(guest, weight, cap, floor, persistent_cap))


@command.command("freeze")
@all_argument
@click.pass_obj
def freeze_command(connect: Connect, guest: str | None) -> int:
    """Stop a guest, or all, from taking new pages and slabs."""
    return _execute(connect, Freeze(guest or ""))


@command.command("thaw")
@all_argument
@click.pass_obj
def thaw_command(connect: Connect, guest: str | None) -> int:
    """Undo freeze and drain for a guest, or for all."""
    return _execute(connect, Thaw(guest or ""))


@command.command("revoke")
@guest_argument
@click.argument("slabs", metavar="SIZE", type=SLABS)
@click.option("--persistent", is_flag=True, help="Ask for memory of its hswap, which is never taken.")
@click.pass_obj
def revoke_command(connect: Connect, guest: str, slabs: int, persistent: bool) -> int:
    """Take SIZE back from a guest."""
    return _execute(connect, TakeBack(guest, slabs, persistent))


@command.command("drain")
@guest_argument
@click.pass_obj
def drain_command(connect: Connect, guest: str) -> int:
    """Take all ephemeral memory back; lend none until thaw."""
    return _execute(connect, Drain(guest))


@command.command("evict")
@guest_argument
@click.option("--yes", is_flag=True, help="Also if it holds pages of a swap-like file, which are lost then.")
@click.pass_obj
def evict_command(connect: Connect, guest: str, yes: bool) -> int:
    """End a guest and free all that it holds.

    Its mount has no pool until it is mounted again. Pages of its swap-like file read as errors from then on:
    processes that are swapped to it are killed when they touch one.
    """
    return _execute(connect, Evict(guest, yes))


@command.command("resize")
@click.argument("slabs", metavar="SIZE", type=SLABS)
@click.pass_obj
def resize_command(connect: Connect, slabs: int) -> int:
    """Change how much memory tmemd lends."""
    check_ram("size", slabs * SLAB_SIZE)
    return _execute(connect, Resize(slabs))


@command.command("stats")
@json_option
@click.pass_obj
def stats_command(connect: Connect, as_text: bool) -> int:
    """Print the sums and counters."""
    counters = connect().totals()
    if as_text:
        print(json.dumps(counters, indent=2))
        return 0
    width = max(map(len, counters), default=0)
    for name, value in counters.items():
        print(f"{printable(name):<{width}} {value}")
    return 0


@command.command("watch")
@click.option("--interval", type=DURATION, default=1.0, help="Time between two tables. [default: 1s]")
@click.option("--count", type=click.IntRange(1), default=None, help="Number of tables. [default: until Ctrl-C]")
@click.pass_obj
def watch_command(connect: Connect, interval: float, count: int | None) -> int:
    """Show the list repeatedly."""
    control, tables, console = connect(), 0, _console()
    live = Live(console=console, auto_refresh=False)
    with live if console.is_terminal else contextlib.nullcontext():  # Live would write only the last table to a pipe
        while True:
            shown = render(control.rows(), control.totals(), console, all_rows=not console.is_terminal)
            if console.is_terminal:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
                sys.stdout.flush()
            tables += 1
            if count is not None and tables >= count:
                return 0
            time.sleep(max(0.1, interval))


def _execute(connect: Connect, verb: Verb) -> int:
    """Send a verb to tmemd and print the answer."""
    answer = connect().execute(verb)
    if answer:
        print(printable(answer))
    return 0


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def main() -> NoReturn:
    """Run tmemctl."""
    run(command, "tmemctl")


if __name__ == "__main__":
    main()
