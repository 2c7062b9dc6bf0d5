"""The commands: they read the words of a command line and call what does the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tmem.lending.guest.listener import parse_user
from tmemcommon.commandline import DURATION, SIZE, Text, run, say
from tmemcommon.sizes import format_size
from tmemcommon.texts import printable
from tmemfs import __version__
from tmemfs.config import (
    MIB,
    BalloonRange,
    ConfigError,
    MountConfig,
    PoolChoice,
    Throttle,
    parse_balloon,
    parse_options,
    parse_pool,
    parse_throttle,
)
from tmemfs.kernel.mounttable import resolve_mountpoint
from tmemfs.lifecycle.controlsocket import RemoteError
from tmemfs.lifecycle.remote import RemoteMount
from tmemfs.lifecycle.top import Watcher, watch
from tmemfs.lifecycle.writingback import Unwritable

USER = Text("USER", parse_user)
POOL = Text("SIZE|none|unix:PATH", parse_pool)
BALLOON = Text("min=…,max=…,idle=…", parse_balloon)
THROTTLE = Text("latency=…,bandwidth=…,depth=…", parse_throttle)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tmemfs")
def cli() -> None:
    """Cache a slow directory in memory: a page cache, and a compressed pool behind it."""


@cli.command("mount")
@click.argument("source")
@click.argument("mountpoint")
@click.option("--cache", type=SIZE, default=64 * MIB, help="Page cache: 64M, 1G, 10% of RAM … [default: 64M]")
@click.option("--pool", type=POOL, default=PoolChoice(256 * MIB), help="Compressed pool. [default: 256M]")
@click.option("--compress/--no-compress", default=True, help="Compress the pool's pages. [default: compress]")
@click.option("--pool-max", type=SIZE, default=None, help="With --pool unix:PATH: borrow no more. [default: all RAM]")
@click.option("--pool-owner", type=USER, default=None, help="Who runs that tmemd, if it is neither root nor you.")
@click.option("--hswap", type=SIZE, default=0, help="Give the mount a swap-like file of this size, .tmemfs/hswap.")
@click.option("--hswap-overflow", metavar="FILE", default=None, help="Where its pages go that the pool refuses.")
@click.option("--balloon", type=BALLOON, default=None, help="Let the cache's size follow need between min and max.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to stderr.")
@click.option("-o", "options", multiple=True, metavar="OPTS", help="Mount options, as mount(8) knows them.")
@click.option("--writeback", is_flag=True, help="Acknowledge writes before the backing has them.")
@click.option("--watch", is_flag=True, help="Notice changes of the backing at once (inotify).")
@click.option("--throttle", type=THROTTLE, default=None, help="Slow the backing down, for experiments.")
@click.option("--attr-timeout", type=DURATION, default=1.0, help="Keep attributes and names. [default: 1s]")
@click.option("--negative-timeout", type=DURATION, default=0.0, help="Keep missing names. [default: 0s]")
@click.option("--backing-cache", type=click.Choice(["drop", "keep"]), default="drop", show_default=True)
@click.option("--version-by", type=click.Choice(["all", "size,mtime"]), default="all", show_default=True)
@click.option("--log", "log_file", metavar="FILE", default=None, help="Log to this file.")
@click.option("--debug", is_flag=True, help="Log everything.")
@click.option("--control-name", default=".tmemfs", show_default=True, help="Name of the mount's control directory.")
def mount_command(
    source: str,
    mountpoint: str,
    cache: int,
    pool: PoolChoice,
    pool_max: int | None,
    pool_owner: int | None,
    hswap: int,
    hswap_overflow: str | None,
    balloon: BalloonRange | None,
    throttle: Throttle | None,
    options: tuple[str, ...],
    log_file: str | None,
    **rest: Any,
) -> int:
    """Mount the directory SOURCE on MOUNTPOINT (which may be SOURCE itself)."""
    if pool_max is not None and pool.socket is None:
        raise ConfigError("--pool-max bounds what is borrowed: give it with --pool unix:PATH, or --pool SIZE alone")
    if pool_owner is not None and pool.socket is None:
        raise ConfigError("--pool-owner says whose tmemd is meant: give it with --pool unix:PATH")
    config = MountConfig(
        source=Path(os.path.realpath(source)),
        mountpoint=resolve_mountpoint(mountpoint),
        cache_bytes=balloon.clamp(cache) if balloon is not None else cache,
        pool_bytes=pool_max or pool.pool_bytes,
        pool_socket=pool.socket,
        pool_owner=pool_owner,
        hswap_bytes=hswap,
        hswap_overflow=Path(os.path.abspath(hswap_overflow)) if hswap_overflow is not None else None,
        balloon=balloon,
        throttle=throttle,
        options=parse_options(options),
        log_file=Path(os.path.abspath(log_file)) if log_file is not None else None,
        **rest,
    )
    # Imported here, so that the other commands start without the filesystem and its libraries.
    from tmemfs.lifecycle.mount import mount

    return mount(config)


@cli.command("umount")
@click.argument("mountpoint", metavar="MNT")
@click.option("-l", "--lazy", is_flag=True, help="Hide a mount that is in use, and wait for its last user.")
@click.option("--timeout", type=DURATION, default=None, help="Wait no longer. [default: 10m; 5s for copies elsewhere]")
@click.option("--wait-backing", "unwritable", flag_value=Unwritable.WAIT, help="Go on trying to write back.")
@click.option("--discard", "unwritable", flag_value=Unwritable.DISCARD, help="Give up what cannot be written back.")
def umount_command(mountpoint: str, lazy: bool, timeout: float | None, unwritable: Unwritable | None) -> int:
    """Unmount MNT and wait until its process has ended and everything is written.

    Exit code 1: it stays mounted, because it is in use, or because what --writeback kept cannot be written: the message
    names the files. Exit code 3: it is unmounted, but its process has not ended in time, and goes on.
    """
    remote = RemoteMount(mountpoint)
    if not remote.umount(lazy=lazy, timeout=timeout, unwritable=unwritable or Unwritable.REFUSE):
        say(f"'{mountpoint}' is unmounted, but did not name its process: its end was not waited for")
    return 0


@cli.command("stats")
@click.argument("mountpoint", metavar="MNT")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--reset", is_flag=True, help="Set the counters to zero.")
def stats_command(mountpoint: str, as_json: bool, reset: bool) -> int:
    """Print the counters of MNT."""
    remote = RemoteMount(mountpoint)
    if reset:
        remote.write("stats", b"reset\n")
        return 0
    # What the process behind a mount says may be anything: it is somebody else's.
    text = remote.read("stats.json" if as_json else "stats").decode(errors="surrogateescape")
    print(*map(printable, text.rstrip("\n").split("\n")), sep="\n")
    return 0


@cli.command("top")
@click.argument("mountpoints", metavar="[MNT…]", nargs=-1)
@click.option("--once", is_flag=True, help="Look once, over one interval, and end.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON, for scripts.")
@click.option("--interval", type=DURATION, default=1.0, help="Time between two looks. [default: 1s]")
def top_command(mountpoints: tuple[str, ...], once: bool, as_json: bool, interval: float) -> int:
    """Show the tmemfs mounts of this machine, or some: hits, cache, pool, swap, and what the backing has to do."""
    only = {resolve_mountpoint(mountpoint) for mountpoint in mountpoints}
    watch(Watcher(only), max(interval, 0.1), once=once, as_json=as_json)
    return 0


@cli.command("swapon")
@click.argument("mountpoint", metavar="MNT")
def swapon_command(mountpoint: str) -> int:
    """Swap to the hswap file of MNT, through a loop device (root only)."""
    device = RemoteMount(mountpoint).swap_on()
    say(f"swapping to '{mountpoint}' through {device}; tmemfs swapoff {mountpoint} ends it")
    return 0


@cli.command("swapoff")
@click.argument("mountpoint", metavar="MNT")
def swapoff_command(mountpoint: str) -> int:
    """Take everything that was swapped to MNT back into memory, and empty its hswap file."""
    RemoteMount(mountpoint).swap_off()
    return 0


@cli.command("resize")
@click.argument("mountpoint", metavar="MNT")
@click.argument("size", type=SIZE)
def resize_command(mountpoint: str, size: int) -> int:
    """Give the page cache of MNT another size while it runs."""
    RemoteMount(mountpoint).write("cache_size", b"%d\n" % size)
    return 0


@cli.command("drop")
@click.argument("mountpoint", metavar="MNT")
@click.argument("path", required=False)
def drop_command(mountpoint: str, path: str | None) -> int:
    """Drop the clean pages of MNT, or of the file PATH in it, from cache and pool."""
    remote = RemoteMount(mountpoint)
    remote.write("drop_caches", b"1\n" if path is None else b"/" + os.fsencode(remote.relative(path)) + b"\n")
    return 0


@cli.command("freeze")
@click.argument("mountpoint", metavar="MNT")
def freeze_command(mountpoint: str) -> int:
    """Have the pool of MNT take no new pages; those that it holds can still be read."""
    RemoteMount(mountpoint).write("freeze", b"1\n")
    return 0


@cli.command("thaw")
@click.argument("mountpoint", metavar="MNT")
def thaw_command(mountpoint: str) -> int:
    """Have the pool of MNT take new pages again."""
    RemoteMount(mountpoint).write("freeze", b"0\n")
    return 0


@cli.command("warm")
@click.argument("mountpoint", metavar="MNT")
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
def warm_command(mountpoint: str, paths: tuple[str, ...]) -> int:
    """Read files and directories of MNT, so that their pages are in memory, and say how much of it stayed."""
    remote = RemoteMount(mountpoint)
    files = list(remote.files([remote.relative(path) for path in paths]))
    total = sum(file.stat().st_size for file in files)
    columns = TextColumn("warming"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("warm", total=total)
        remote.warm(files, lambda size: progress.advance(task, size))
    try:
        held = min(total, remote.held_bytes(files))
    except RemoteError as error:
        say(f"read {format_size(total)}; how much of it stayed in memory cannot be asked: {error}")
    else:
        say(f"read {format_size(total)}, {format_size(held)} of it are in memory now ({100 * held // max(1, total)} %)")
    return 0


def main() -> NoReturn:
    """Run a command."""
    run(cli, "tmemfs")
