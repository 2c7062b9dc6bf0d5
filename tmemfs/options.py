"""The -o options of a mount, as mount(8) knows them.

One place decides what each word means to the three that must be told: mount(2) takes flags and a data string,
fusermount3 takes words, and libfuse takes the few options that it implements itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tmemcommon.sizes import ConfigError

# Mounts are recognized by it (fuse.tmemfs in the mount table), so it cannot be chosen.
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
# Words that only mean something to mount(8) and fstab: accepted, so that a line of fstab can be used as is.
_IGNORED = frozenset(("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev"))
_ALWAYS = ("default_permissions", f"subtype={SUBTYPE}")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Hold what -o asked for, parsed.

    `flags` are those of mount(2). nosuid and nodev are on until switched off, as libfuse has it.
    default_permissions is always on: without it the kernel checks no permission at all, and a mount of root
    with allow_other would open every file to everybody.
    """

    flags: int = MS_NOSUID | MS_NODEV
    allow_other: bool = False
    allow_root: bool = False
    fsname: str | None = None

    @property
    def read_only(self) -> bool:
        """Tell whether nothing may be written through the mount."""
        return bool(self.flags & MS_RDONLY)

    @property
    def synchronous(self) -> bool:
        """Tell whether every write is to be on the disk when it returns (the kernel leaves that to us)."""
        return bool(self.flags & MS_SYNCHRONOUS)

    def kernel_data(self, fd: int, uid: int, gid: int) -> str:
        """Build the data argument of mount(2) for a /dev/fuse descriptor."""
        words = [f"fd={fd}", "rootmode=40000", f"user_id={uid}", f"group_id={gid}", "default_permissions"]
        # The kernel has no allow_root: libfuse admits only root and the owner to what allow_other lets in.
        if self.allow_other or self.allow_root:
            words.append("allow_other")
        return ",".join(words)

    def words(self, fsname: str) -> list[str]:
        """Name every option in the words of fusermount3."""
        words = [name for name, flag in _SETS.items() if self.flags & flag]
        words += [name for name, flag in _CLEARS.items() if name in ("suid", "dev") and not self.flags & flag]
        words += ["default_permissions", f"fsname={_escape(fsname)}", f"subtype={SUBTYPE}"]
        if self.allow_other or self.allow_root:
            words.append("allow_other")
        return words

    def libfuse_words(self) -> set[str]:
        """Name the options that libfuse implements by itself."""
        return {"allow_root"} if self.allow_root else set()

    def plain_words(self, fsname: str) -> set[str]:
        """Name every option for libfuse, when it is libfuse that mounts."""
        words = set(self.words(fsname))
        if self.allow_root:
            # libfuse asks the kernel for allow_other by itself, and refuses both at once.
            words.discard("allow_other")
            words.add("allow_root")
        return {word for word in words if word.isascii()}


def _escape(value: str) -> str:
    """Escape what would end an option: fusermount3 and libfuse split at commas."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


def parse_options(texts: Iterable[str]) -> MountOptions:
    """Parse every -o of a command line; a later word wins over an earlier one."""
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
            raise ConfigError(f"unknown mount option '{word}' in -o: known are {_known()}")
    if allow_other and allow_root:
        raise ConfigError("-o allow_other and -o allow_root exclude each other: give one of them")
    return MountOptions(flags, allow_other, allow_root, fsname)


def _known() -> str:
    """List the option words for a message."""
    words = [*_SETS, *_CLEARS, "allow_other", "allow_root", *_ALWAYS, "fsname=NAME"]
    return ", ".join(sorted(words))
