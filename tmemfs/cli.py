"""The command line of tmemfs: it parses options and arguments and calls the functions that do the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tmem.lending.guest.trustedsocket import parse_user
from tmemcommon.commandline import DURATION, SIZE, Text, run, say
from tmemcommon.sizes import MIB, ConfigError, format_size
from tmemcommon.texts import printable
from tmemfs import __version__
from tmemfs.config import BalloonRange, MountConfig, PoolChoice, Throttle, parse_balloon, parse_pool, parse_throttle
from tmemfs.kernel.mounttable import resolve_mountpoint
from tmemfs.lifecycle.controlclient import RemoteError
from tmemfs.lifecycle.remotemount import RemoteMount
from tmemfs.lifecycle.swapon import swapoff, swapon
from tmemfs.lifecycle.top import Watcher
from tmemfs.lifecycle.topview import show
from tmemfs.lifecycle.umount import Unwritable, umount
from tmemfs.lifecycle.warm import held_bytes, read_all, regular_files
from tmemfs.options import parse_options

USER = Text("USER", parse_user)
POOL = Text("SIZE|none|unix:PATH", parse_pool)
BALLOON = Text("min=…,max=…,idle=…", parse_balloon)
THROTTLE = Text("latency=…,bandwidth=…,depth=…", parse_throttle)
BACKING_CACHE = click.Choice(["drop", "keep"])
BACKING_CACHE_HELP = "Drop SOURCE's pages from the kernel's page cache after a read, or keep them."
VERSION_BY = click.Choice(["all", "size,mtime"])
VERSION_BY_HELP = "Attributes that are compared to notice that a file of SOURCE has changed."


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tmemfs")
def cli() -> None:
    """Cache a slow directory in memory: a page cache, and behind it a compressed pool."""


@cli.command("mount")
@click.argument("source")
@click.argument("mountpoint")
@click.option("--cache", type=SIZE, default=64 * MIB, help="Page cache: 64M, 1G, 10% of RAM. [default: 64M]")
@click.option("--pool", type=POOL, default=PoolChoice(256 * MIB), help="Compressed pool. [default: 256M]")
@click.option("--compress/--no-compress", default=True, help="Compress the pages in the pool. [default: compress]")
@click.option("--pool-max", type=SIZE, default=None, help="With --pool unix:PATH: most to borrow. [default: 100%]")
@click.option("--pool-owner", type=USER, default=None, help="User of that tmemd, if neither root nor you.")
@click.option("--hswap", type=SIZE, default=0, help="Size of the swap-like file .tmemfs/hswap. [default: no file]")
@click.option("--hswap-overflow", metavar="FILE", default=None, help="File for its pages that the pool refuses.")
@click.option("--balloon", type=BALLOON, default=None, help="Resize the page cache by demand, between min and max.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to stderr.")
@click.option("-o", "options", multiple=True, metavar="OPTS", help="Mount options as for mount(8).")
@click.option("--writeback", is_flag=True, help="Acknowledge writes before they are in SOURCE.")
@click.option("--watch", is_flag=True, help="Notice changes of SOURCE at once (inotify).")
@click.option("--throttle", type=THROTTLE, default=None, help="Slow SOURCE down, for experiments.")
@click.option("--attr-timeout", type=DURATION, default=1.0, help="Cache attributes and names so long. [default: 1s]")
@click.option("--negative-timeout", type=DURATION, default=0.0, help="Cache missing names so long. [default: 0s]")
@click.option("--backing-cache", type=BACKING_CACHE, default="drop", show_default=True, help=BACKING_CACHE_HELP)
@click.option("--version-by", type=VERSION_BY, default="all", show_default=True, help=VERSION_BY_HELP)
@click.option("--log", "log_file", metavar="FILE", default=None, help="Log file.")
@click.option("--debug", is_flag=True, help="Log debug messages, too.")
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
    """Mount SOURCE on MOUNTPOINT. They may be the same directory."""
    if pool_max is not None and pool.socket is None:
        raise ConfigError("--pool-max limits what is borrowed: give it with --pool unix:PATH, or --pool SIZE alone")
    if pool_owner is not None and pool.socket is None:
        raise ConfigError("--pool-owner names the user of tmemd: give it with --pool unix:PATH")
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
    # Imported here, so that the other commands start faster: they need neither the filesystem nor its libraries.
    from tmemfs.lifecycle.mount import mount

    return mount(config)


@cli.command("umount")
@click.argument("mountpoint", metavar="MNT")
@click.option("-l", "--lazy", is_flag=True, help="Detach a mount in use, and wait for its last user.")
@click.option("--timeout", type=DURATION, default=None, help="Wait no longer. [default: 10m; 5s while MNT has copies]")
@click.option(
    "--wait-backing", "unwritable", flag_value=Unwritable.WAIT, help="Retry failed write-backs until they work."
)
@click.option("--discard", "unwritable", flag_value=Unwritable.DISCARD, help="Drop changes that cannot be written.")
def umount_command(mountpoint: str, lazy: bool, timeout: float | None, unwritable: Unwritable | None) -> int:
    """Unmount MNT and wait until its process has ended. First everything is written back.

    Exit code 1: MNT stays mounted. It is in use, or it has changes that cannot be written back; the message names the
    files. Exit code 3: MNT is unmounted, but its process has not ended in time and still runs.
    """
    mount = RemoteMount(mountpoint)
    if not umount(mount, lazy=lazy, timeout=timeout, unwritable=unwritable or Unwritable.REFUSE):
        say(f"'{mountpoint}' is unmounted, but its process was not found: its end was not waited for")
    return 0


@cli.command("stats")
@click.argument("mountpoint", metavar="MNT")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--reset", is_flag=True, help="Set the counters to zero.")
def stats_command(mountpoint: str, as_json: bool, reset: bool) -> int:
    """Print the counters of MNT."""
    mount = RemoteMount(mountpoint)
    if reset:
        mount.write("stats", b"reset\n")
        return 0
    # Untrusted: the mount may be another user's.
    text = mount.read("stats.json" if as_json else "stats").decode(errors="surrogateescape")
    print(*map(printable, text.rstrip("\n").split("\n")), sep="\n")
    return 0


@cli.command("top")
@click.argument("mountpoints", metavar="[MNT…]", nargs=-1)
@click.option("--once", is_flag=True, help="Show one interval and exit.")
@click.option("--json", "as_json", is_flag=True, help="Show one interval as JSON and exit.")
@click.option("--interval", type=DURATION, default=1.0, help="Time between two updates. [default: 1s]")
def top_command(mountpoints: tuple[str, ...], once: bool, as_json: bool, interval: float) -> int:
    """Show all mounts of this machine, or some. For each: hit ratio, cache, pool, swap and load on SOURCE."""
    only = {resolve_mountpoint(mountpoint) for mountpoint in mountpoints}
    show(Watcher(only), max(interval, 0.1), once=once, as_json=as_json)
    return 0


@cli.command("swapon")
@click.argument("mountpoint", metavar="MNT")
def swapon_command(mountpoint: str) -> int:
    """Swap to the hswap file of MNT, through a loop device. Needs root."""
    device = swapon(RemoteMount(mountpoint))
    say(f"swapping to '{mountpoint}' through {device}; tmemfs swapoff {mountpoint} ends this")
    return 0


@cli.command("swapoff")
@click.argument("mountpoint", metavar="MNT")
def swapoff_command(mountpoint: str) -> int:
    """End swapping to MNT. All its pages are read back into memory, and its hswap file is emptied. Needs root."""
    swapoff(RemoteMount(mountpoint))
    return 0


@cli.command("resize")
@click.argument("mountpoint", metavar="MNT")
@click.argument("size", type=SIZE)
def resize_command(mountpoint: str, size: int) -> int:
    """Resize the page cache of MNT."""
    RemoteMount(mountpoint).write("cache_size", b"%d\n" % size)
    return 0


@cli.command("drop")
@click.argument("mountpoint", metavar="MNT")
@click.argument("path", required=False)
def drop_command(mountpoint: str, path: str | None) -> int:
    """Drop clean pages from cache and pool. With PATH only those of this file."""
    mount = RemoteMount(mountpoint)
    mount.write("drop_caches", b"1\n" if path is None else b"/" + os.fsencode(mount.relative(path)) + b"\n")
    return 0


@cli.command("freeze")
@click.argument("mountpoint", metavar="MNT")
def freeze_command(mountpoint: str) -> int:
    """Make the pool of MNT refuse new pages. The pages in it can still be read."""
    RemoteMount(mountpoint).write("freeze", b"1\n")
    return 0


@cli.command("thaw")
@click.argument("mountpoint", metavar="MNT")
def thaw_command(mountpoint: str) -> int:
    """Make the pool of MNT accept new pages again."""
    RemoteMount(mountpoint).write("freeze", b"0\n")
    return 0


@cli.command("warm")
@click.argument("mountpoint", metavar="MNT")
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
def warm_command(mountpoint: str, paths: tuple[str, ...]) -> int:
    """Read files of MNT into memory. A directory stands for all files below it. Prints how much stayed in memory."""
    mount = RemoteMount(mountpoint)
    files = list(regular_files(mount, map(mount.relative, paths)))
    total = sum(file.stat().st_size for file in files)
    columns = TextColumn("warming"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("warm", total=total)
        read_all(files, lambda size: progress.advance(task, size))
    try:
        held = min(total, held_bytes(mount, files))
    except RemoteError as error:
        say(f"read {format_size(total)}; how much of it is in memory is unknown: {error}")
    else:
        percent = 100 * held // max(1, total)
        say(f"read {format_size(total)}, of which {format_size(held)} are in memory now ({percent} %)")
    return 0


def main() -> NoReturn:
    """Run a command."""
    run(cli, "tmemfs")
