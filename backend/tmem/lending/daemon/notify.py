"""What systemd is told of tmemd's state, over the socket that it names in NOTIFY_SOCKET; without one, nobody."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(*lines: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send assignments such as READY=1 to the service manager; tell whether somebody was told."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # a name in the kernel's abstract space
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.send("\n".join(lines).encode())
        return True
    return False  # a service manager that does not listen is no reason not to lend
