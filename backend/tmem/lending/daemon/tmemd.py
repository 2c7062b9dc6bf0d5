"""tmemd, the lending daemon: its command line, its process, its end."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import click
import trio

from tmem.arena import SLAB_SIZE
from tmem.lending.daemon import processes
from tmem.lending.daemon.arenas import Arenas
from tmem.lending.daemon.broker import Broker
from tmem.lending.daemon.holdings import Holdings, Record
from tmem.lending.daemon.loglines import LineFilter
from tmem.lending.daemon.notify import READY, STOPPING, notify
from tmem.lending.daemon.server import Server
from tmem.lending.daemon.socketfile import SocketFile, default_path, parse_mode
from tmem.lending.guest.listener import is_open_to_others
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimpolicy import DEFAULT, RECLAIM_POLICIES
from tmemcommon.commandline import SIZE, Text, run
from tmemcommon.logwriter import LogWriter
from tmemcommon.sizes import MIB, ConfigError, check_ram, ram_bytes
from tmemcommon.texts import LogFormatter

log = logging.getLogger(__name__)

MODE = Text("MODE", parse_mode)
_WHERE = "Where to listen. [default: /run/tmemd.sock for root, tmemd.sock in XDG_RUNTIME_DIR for others]"
_CREDITS = 256  # parts of the size: what the holdings file may say too much of each guest
_LEAST_CREDIT = 64  # slabs: one batch


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", type=SIZE, required=True, help="Memory to lend: 4G, 512M, 25% of RAM …")
@click.option("--socket", "socket_path", metavar="PATH", default=None, help=_WHERE)
@click.option(
    "--policy",
    type=click.Choice(tuple(RECLAIM_POLICIES)),
    default=DEFAULT,
    show_default=True,
    help="Who gives way to whom.",
)
@click.option("--mode", type=MODE, default=0o660, help="Mode of the socket: who may borrow. [default: 0660]")
@click.option("--group", metavar="NAME", default=None, help="Group of the socket.")
@click.option("--uid-cap", type=SIZE, default=None, help="Most that the guests of one user other than root may hold.")
@click.option(
    "--uid-persistent",
    type=SIZE,
    default=None,
    help="Most that the guests of one user may hold for good (hswap, floors). [default: half of the size]",
)
@click.option("--reserve", type=SIZE, default=None, help="Memory of the machine to leave alone. [default: 2% of RAM]")
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

    spared = ram_bytes() // 50 if reserve is None else reserve
    bounds = UserBounds(
        cap=None if uid_cap is None else uid_cap // SLAB_SIZE,
        persistent=None if uid_persistent is None else uid_persistent // SLAB_SIZE,
        trusted=trusted(),
    )
    trio.run(serve, listen, size // SLAB_SIZE, policy, bounds, spared)
    return 0


def trusted() -> frozenset[int]:
    """Give the users who may have all, and change anything: root and the one who runs this tmemd."""
    return frozenset((0, os.geteuid()))


def prepare_process() -> None:
    """Take many descriptors, let nobody of the same user at those of the guests, and go on without a terminal."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    processes.make_undumpable()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reopen; workers inherit this


def start_log(debug: bool) -> None:
    """Log to stderr; the journal has clocks of its own."""
    clock = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    handler = LogWriter.to_stderr()
    handler.setFormatter(LogFormatter(f"{clock}%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(LineFilter())
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])


def holdings_path(socket_path: Path) -> Path:
    """Choose where what guests hold is kept: in the directory that systemd made for it, else beside the socket."""
    directory = os.environ.get("RUNTIME_DIRECTORY")
    return Path(directory, "holdings") if directory else socket_path.with_name(socket_path.name + ".holdings")


async def serve(listen: Callable[[], SocketFile], size: int, policy: str, bounds: UserBounds, reserve: int) -> None:
    """Lend until SIGTERM or SIGINT. Guests keep what they hold, and come back to the next tmemd."""
    with (
        # Before anybody sees the socket: from then on we may be ended, and are to take it with us.
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
        contextlib.closing(listen()) as socket_file,
    ):
        credit = max(_LEAST_CREDIT, size // _CREDITS)
        holdings = Holdings(holdings_path(socket_file.path), credit)
        away = list(_still_there(holdings.load()))
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
            mib = size * SLAB_SIZE // MIB
            log.info("lending %d MiB on '%s', pid %d, policy %s", mib, socket_file.path, os.getpid(), policy)
            directory = socket_file.path.parent
            if is_open_to_others(directory.stat().st_mode):
                log.warning("no guest uses this socket: others may write to '%s' and take its place", directory)
            notify(READY, f"STATUS=lending {mib} MiB")
            async for number in signals:
                log.info("%s: ending; guests keep what they hold", signal.Signals(number).name)
                break
            notify(STOPPING)
            nursery.cancel_scope.cancel()
        broker.flush_holdings()
        arenas.close()


def _still_there(records: list[Record]) -> Iterator[tuple[Record, int]]:
    """Give the records of guests whose process runs, each with a pidfd."""
    for record in records:
        pidfd = processes.reopen(record.process)
        if pidfd is not None:
            yield record, pidfd


def main() -> NoReturn:
    """Run tmemd."""
    run(command, "tmemd")


if __name__ == "__main__":
    main()
