"""Tell the versions of files apart by their stats."""

from __future__ import annotations

import os
from collections.abc import Callable

from tmemfs.inodes.inode import Version


def version_of(version_by: str) -> Callable[[os.stat_result], Version]:
    """Return the function that makes a version of a stat: `all` or `size,mtime`."""
    if version_by == "all":
        return lambda st: (st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino)
    return lambda st: (st.st_size, st.st_mtime_ns)


def newest_of(version_by: str) -> Callable[[os.stat_result], int]:
    """Return the function that gives the newest stamp of a version, in ns."""
    if version_by == "all":
        return lambda st: max(st.st_mtime_ns, st.st_ctime_ns)
    return lambda st: st.st_mtime_ns
