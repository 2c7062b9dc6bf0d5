"""The -o options of a mount, as in mount(8).

They are translated for three receivers: mount(2) takes flags and a data string, fusermount3 takes words, and libfuse
takes the few options that it implements itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tmemcommon.sizes import ConfigError

# Mounts are recognized by it: fuse.tmemfs in the mount table. So it is no option.
SUBTYPE = "tmemfs"

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

_SETS = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS,
    "dirsync": MS_DIRSYNC,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
    "strictatime": MS_STRICTATIME,
    "lazytime": MS_LAZYTIME,
}
_CLEARS = {
    "rw": MS_RDONLY,
    "suid": MS_NOSUID,
    "dev": MS_NODEV,
    "exec": MS_NOEXEC,
    "async": MS_SYNCHRONOUS,
    "atime": MS_NOATIME,
    "diratime": MS_NODIRATIME,
    "norelatime": MS_RELATIME,
    "nostrictatime": MS_STRICTATIME,
    "nolazytime": MS_LAZYTIME,
}
# Words for mount(8) alone. They are accepted so that options can be copied from fstab.
_IGNORED = frozenset(("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev"))
_ALWAYS = ("default_permissions", f"subtype={SUBTYPE}")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The parsed -o options.

    `flags` are those of mount(2). nosuid and nodev are on by default, as in libfuse. default_permissions is always on:
    without it the kernel checks no permissions, and a mount by root with allow_other would open all files to all users.
    """

    flags: int = MS_NOSUID | MS_NODEV
    allow_other: bool = False
    allow_root: bool = False
    fsname: str | None = None

    @property
    def read_only(self) -> bool:
        """Whether the mount is read-only."""
        return bool(self.flags & MS_RDONLY)

    @property
    def synchronous(self) -> bool:
        """Whether every write must be on the disk when it returns. The kernel leaves this to the filesystem."""
        return bool(self.flags & MS_SYNCHRONOUS)

    def kernel_data(self, fd: int, uid: int, gid: int) -> str:
        """Return the data argument of mount(2) for a /dev/fuse descriptor."""
        words = [f"fd={fd}", "rootmode=40000", f"user_id={uid}", f"group_id={gid}", "default_permissions"]
        # The kernel has no allow_root: libfuse implements it, by refusing other users that allow_other admits.
        if self.allow_other or self.allow_root:
            words.append("allow_other")
        return ",".join(words)

    def words(self, fsname: str) -> list[str]:
        """Return all options as words for fusermount3."""
        words = [name for name, flag in _SETS.items() if self.flags & flag]
        words += [name for name, flag in _CLEARS.items() if name in ("suid", "dev") and not self.flags & flag]
        words += ["default_permissions", f"fsname={_escape(fsname)}", f"subtype={SUBTYPE}"]
        if self.allow_other or self.allow_root:
            words.append("allow_other")
        return words

    def libfuse_words(self) -> set[str]:
        """Return the options that libfuse implements itself."""
        return {"allow_root"} if self.allow_root else set()

    def plain_words(self, fsname: str) -> set[str]:
        """Return all options as words for libfuse, when libfuse itself mounts."""
        words = set(self.words(fsname))
        if self.allow_root:
            # libfuse adds allow_other by itself, and refuses to be given both.
            words.discard("allow_other")
            words.add("allow_root")
        return {word for word in words if word.isascii()}


def _escape(value: str) -> str:
    """Escape commas and backslashes: fusermount3 and libfuse split options at commas."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


def parse_options(texts: Iterable[str]) -> MountOptions:
    """Parse all -o options of a command line; a later word overrides an earlier one. Raises ConfigError."""
    flags = MountOptions().flags
    allow_other = allow_root = False
    fsname: str | None = None
    for word in (word for text in texts for word in text.split(",") if word):
        name, equals, value = word.partition("=")
        if word in _SETS:
            flags |= _SETS[word]
        elif word in _CLEARS:
            flags &= ~_CLEARS[word]
        elif word == "allow_other":
            allow_other = True
        elif word == "allow_root":
            allow_root = True
        elif equals and name == "fsname" and value:
            fsname = value
        elif word not in _ALWAYS and word not in _IGNORED and not word.startswith("x-"):
            raise ConfigError(f"unknown mount option '{word}' in -o: give one of {_known_words()}")
    if allow_other and allow_root:
        raise ConfigError("-o allow_other and -o allow_root exclude each other: give one of them")
    return MountOptions(flags, allow_other, allow_root, fsname)


def _known_words() -> str:
    """Return all option words, for a message."""
    words = [*_SETS, *_CLEARS, "allow_other", "allow_root", *_ALWAYS, "fsname=NAME"]
    return ", ".join(sorted(words))
