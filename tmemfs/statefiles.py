"""Names and directories of the files that a mount keeps outside of SOURCE: log, overflow file, control socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

_NAME_BYTES = 200  # of NAME_MAX: suffixes are added
_ESCAPED = re.compile(rb"[^A-Za-z0-9:_.]")


def mount_name(mountpoint: Path) -> str:
    """Return a file name for the files of a mount, unique for each mountpoint.

    Escaped as by `systemd-escape --path`. A name that is too long becomes a hash and its end.
    """
    parts = os.fsencode(mountpoint).strip(b"/").split(b"/")
    escaped = [_ESCAPED.sub(lambda match: b"\\x%02x" % match[0][0], part) for part in parts]
    name = (b"-".join(escaped) or b"-").decode("ascii")
    if name.startswith("."):
        name = "\\x2e" + name[1:]
    if len(name) > _NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]
        name = f"{digest}-{name[len(digest) + 1 - _NAME_BYTES :]}"
    return name


def state_directory() -> Path:
    """Return the directory in which a user's mounts keep files that outlive a login."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "tmemfs"


def make_private(directory: Path) -> None:
    """Create a directory and its missing parents with mode 0700, whatever the umask is."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
