"""tmemd, the lending daemon: its command line, its process, and what it tells systemd."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import click
import trio

from tmem.arena import SLAB_SIZE
from tmem.lending.daemon import processes
from tmem.lending.daemon.arenas import Arenas
from tmem.lending.daemon.broker import Broker
from tmem.lending.daemon.holdingsfile import HoldingsFile, Record
from tmem.lending.daemon.ratelimits import LogLimiter
from tmem.lending.daemon.server import Server
from tmem.lending.daemon.socketfile import SocketFile, default_path, parse_mode
from tmem.lending.guest.trustedsocket import is_open_to_others
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimpolicy import DEFAULT, RECLAIM_POLICIES
from tmemcommon.commandline import SIZE, Text, run
from tmemcommon.logwriter import LogWriter
from tmemcommon.sizes import ConfigError, check_ram, format_size, ram_bytes
from tmemcommon.texts import LogFormatter

log = logging.getLogger(__name__)

MODE = Text("MODE", parse_mode)
_WHERE = "Where to listen. [default: /run/tmemd.sock for root, tmemd.sock in XDG_RUNTIME_DIR for others]"
_CREDIT_DIVISOR = 256  # the holdings file has a credit of size / 256 for each guest
_MIN_CREDIT = 64  # slabs: one batch
READY = "READY=1"
STOPPING = "STOPPING=1"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", type=SIZE, required=True, help="Memory to lend: 4G, 512M, 25% of RAM …")
@click.option("--socket", "socket_path", metavar="PATH", default=None, help=_WHERE)
@click.option(
    "--policy",
    type=click.Choice(tuple(RECLAIM_POLICIES)),
    default=DEFAULT,
    show_default=True,
    help="Whose slabs are reclaimed first.",
)
@click.option("--mode", type=MODE, default=0o660, help="Mode of the socket: who may borrow. [default: 0660]")
@click.option("--group", metavar="NAME", default=None, help="Group of the socket.")
@click.option("--uid-cap", type=SIZE, default=None, help="The most that the guests of a user other than root may hold.")
@click.option(
    "--uid-persistent",
    type=SIZE,
    default=None,
    help="The most that the guests of a user may hold for good (hswap, floors). [default: half of the size]",
)
@click.option("--reserve", type=SIZE, default=None, help="Memory of the machine to keep free. [default: 2% of RAM]")
@click.option("--debug", is_flag=True, help="Log everything.")
@click.version_option(package_name="tmemfs", prog_name="tmemd")
def command(
    size: int,
    socket_path: str | None,
    policy: str,
    mode: int,
    group: str | None,
    uid_cap: int | None,
    uid_persistent: int | None,
    reserve: int | None,
    debug: bool,
) -> int:
    """Lend memory to the pools of many mounts, and take it back from those that need it least."""
    if size < SLAB_SIZE:
        raise ConfigError(f"--size: {size} bytes are less than one slab: give at least 64K")
    if uid_cap is not None and uid_cap < SLAB_SIZE:
        raise ConfigError(f"--uid-cap: {uid_cap} bytes are less than one slab: give at least 64K")
    check_ram("size", size)
    check_ram("reserve", reserve or 0)
    prepare_process()
    start_log(debug)
    path = None if socket_path is None else Path(os.path.abspath(socket_path))

    def listen() -> SocketFile:
        return SocketFile.passed() or SocketFile.create(path or default_path(), mode, group)

    free = ram_bytes() // 50 if reserve is None else reserve
    bounds = UserBounds(
        cap=None if uid_cap is None else uid_cap // SLAB_SIZE,
        persistent=None if uid_persistent is None else uid_persistent // SLAB_SIZE,
        trusted=trusted(),
    )
    trio.run(serve, listen, size // SLAB_SIZE, policy, bounds, free)
    return 0


def trusted() -> frozenset[int]:
    """Return the users without bounds, who may also change settings: root and the user that runs this tmemd."""
    return frozenset((0, os.geteuid()))


def prepare_process() -> None:
    """Raise the limit of descriptors, protect them from processes of the same user, and ignore SIGHUP."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    processes.make_undumpable()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # tmemd survives its terminal; workers inherit this


def start_log(debug: bool) -> None:
    """Log to stderr, with the time unless the journal adds it."""
    clock = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    handler = LogWriter.to_stderr()
    handler.setFormatter(LogFormatter(f"{clock}%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(LogLimiter())
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])


def holdings_path(socket_path: Path) -> Path:
    """Return the path of the holdings file: in the directory that systemd made for it, else beside the socket."""
    directory = os.environ.get("RUNTIME_DIRECTORY")
    return Path(directory, "holdings") if directory else socket_path.with_name(socket_path.name + ".holdings")


async def serve(listen: Callable[[], SocketFile], size: int, policy: str, bounds: UserBounds, reserve: int) -> None:
    """Lend until SIGTERM or SIGINT. Guests keep what they hold and reconnect to the next tmemd."""
    with (
        # Before the socket exists, so that a signal always removes it.
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
        contextlib.closing(listen()) as socket_file,
    ):
        credit = max(_MIN_CREDIT, size // _CREDIT_DIVISOR)
        holdings = HoldingsFile(holdings_path(socket_file.path), credit)
        away = list(_still_running(holdings.load()))
        lender = Lender(
            size,
            policy=RECLAIM_POLICIES[policy],
            bounds=bounds,
            holdings=[record.holding for record, _ in away],
        )
        arenas, counters = Arenas(), Counter[str]()
        broker = Broker(lender, arenas, holdings, counters, reserve)
        server = Server(socket_file.listener, broker, counters, trusted())
        async with trio.open_nursery() as nursery:
            await nursery.start(broker.run, away)
            nursery.start_soon(server.run)
            lent = format_size(size * SLAB_SIZE)
            log.info("lending %s on '%s', pid %d, policy %s", lent, socket_file.path, os.getpid(), policy)
            directory = socket_file.path.parent
            if is_open_to_others(directory.stat().st_mode):
                log.warning("guests refuse this socket, as others can replace it: chmod go-w '%s'", directory)
            notify(READY, f"STATUS=lending {lent}")
            async for number in signals:
                log.info("%s: exiting; guests keep what they hold", signal.Signals(number).name)
                break
            notify(STOPPING)
            nursery.cancel_scope.cancel()
        broker.flush_holdings()
        arenas.close()


def _still_running(records: list[Record]) -> Iterator[tuple[Record, int]]:
    """Yield the records of guests whose process still runs, each with a pidfd."""
    for record in records:
        pidfd = processes.reopen(record.process)
        if pidfd is not None:
            yield record, pidfd


def notify(*lines: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send assignments such as READY=1 to the socket in NOTIFY_SOCKET (sd_notify); return whether that worked."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.send("\n".join(lines).encode())
        return True
    return False  # tmemd lends also without a service manager


def main() -> NoReturn:
    """Run tmemd."""
    run(command, "tmemd")


if __name__ == "__main__":
    main()
