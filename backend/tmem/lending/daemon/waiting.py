"""Waiting for a connection: until it can be read, until it took what is queued, and no longer than it is open."""

from __future__ import annotations

import time

import trio

from tmem.lending.daemon.connection import Connection, Ended


async def flush(connection: Connection) -> None:
    """Send what a connection has queued, as the peer reads it."""
    try:
        while connection.queued_bytes and connection.fileno() >= 0:
            await trio.lowlevel.wait_writable(connection)
            connection.flush()
    except (trio.ClosedResourceError, Ended):
        pass  # the reader of this connection hears of it too
    finally:
        connection.is_flushing = False


async def readable(connection: Connection) -> None:
    """Wait until there is something to read, and the connection's user may send it.

    Raises ClosedResourceError when the connection is closed here.
    """
    if connection.fileno() < 0:
        raise trio.ClosedResourceError("closed before it was waited for")
    await trio.lowlevel.wait_readable(connection)
    while delay := connection.delay(time.monotonic()):
        await trio.sleep(delay)
    if connection.fileno() < 0:
        raise trio.ClosedResourceError("closed while it was waited for")


def hang_up(connection: Connection) -> None:
    """Close a connection under whoever waits for it."""
    if connection.fileno() >= 0:
        trio.lowlevel.notify_closing(connection)
        connection.close()
