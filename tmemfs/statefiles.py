"""Names and directories of what a mount keeps outside of its source: log, overflow file, control socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

_NAME_BYTES = 200  # leaves room for what a file's name has besides
_NOT_PLAIN = re.compile(rb"[^A-Za-z0-9:_.]")


def mount_name(mountpoint: Path) -> str:
    """Make a file name of a mountpoint, for what belongs to its mount: another one for each.

    Escaped as by `systemd-escape --path`; of a name that is too long for that, the end and a hash of the whole.
    """
    parts = os.fsencode(mountpoint).strip(b"/").split(b"/")
    plain = [_NOT_PLAIN.sub(lambda match: b"\\x%02x" % match[0][0], part) for part in parts]
    name = (b"-".join(plain) or b"-").decode("ascii")
    if name.startswith("."):
        name = "\\x2e" + name[1:]
    if len(name) > _NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]
        name = f"{digest}-{name[len(digest) + 1 - _NAME_BYTES :]}"
    return name


def state_directory() -> Path:
    """Say where an ordinary user's mounts keep what outlives a login."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "tmemfs"


def make_private(directory: Path) -> None:
    """Make a directory, and those above it that are missing, for their owner alone whatever the umask is."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
