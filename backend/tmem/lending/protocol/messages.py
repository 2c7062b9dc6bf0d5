"""The messages between guests, tmemd and tmemctl: frozen structs whose every field is bounded.

Slabs travel as runs (`runs.py`). A list that is too long for one message is sent as several; only the final one has
`last`. A line for a person is shortened to its bound. Sizes are slabs unless the name says bytes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.runs import MAX_RUNS, validate
from tmemcommon.texts import shortened

VERSION = 1
MAX_SLABS = 1 << 24  # slabs of the largest arena, 1 TiB
MAX_ASK = 1024  # slabs in one Ask
BATCH_SLABS = 64  # slabs populated at once, and the excess that an honest guest may have
RETRY = 0.1  # seconds after which a denied guest may ask again
MAX_ROWS = 24  # rows in one Table
MAX_TEXT = 512
MAX_SECONDS = 1e9
TOKEN_BYTES = 16
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0

_Number = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
_Serial = Annotated[int, Meta(ge=1, le=(1 << 32) - 1)]
_Slabs = Annotated[int, Meta(ge=0, le=MAX_SLABS)]
_Some = Annotated[int, Meta(ge=1, le=MAX_SLABS)]
_Asked = Annotated[int, Meta(ge=1, le=MAX_ASK)]
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, Meta(ge=0.0, le=MAX_SECONDS)]
_Weight = Annotated[float, Meta(ge=MIN_WEIGHT, le=MAX_WEIGHT)]
_Text = Annotated[str, Meta(max_length=MAX_TEXT)]
_Name = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
_Token = Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
_Place = Annotated[int, Meta(ge=0, le=MAX_SLABS - 1)]
_Runs = Annotated[tuple[tuple[_Place, _Some], ...], Meta(max_length=MAX_RUNS)]


class _Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: a tagged array."""


class _WithLine(_Message, frozen=True):
    """A message with a line for a person; it is shortened to MAX_TEXT."""

    _line: ClassVar[str] = "reason"

    def __post_init__(self) -> None:
        line = getattr(self, self._line)
        if len(line) > MAX_TEXT:
            force_setattr(self, self._line, shortened(line, MAX_TEXT))


class _WithRuns(_Message, frozen=True):
    """A message that names slabs."""

    runs: _Runs

    def __post_init__(self) -> None:
        validate(self.runs, MAX_SLABS)


# Guest to tmemd.


class Hello(_Message, frozen=True, tag=1):
    """Register; the first message. The memfd comes with its first byte.

    `persistent_slabs` is the persistent cap that is wanted: 0 without an hswap, None for half of the arena (or
    what fits). With `again` the guest held slabs when it lost its connection; its Claims must follow at once.
    """

    version: _Number
    token: _Token  # identifies this guest process; secret, made by it at random
    name: _Name  # the mountpoint
    slabs: _Some  # size of the arena
    persistent_slabs: _Slabs | None = None
    again: bool = False


class Claim(_WithRuns, frozen=True, tag=2):
    """Name held slabs of one kind, after Hello(again=True); the rest of the arena is punched at the last."""

    persistent: bool
    last: bool

    @property
    def kind(self) -> Kind:
        """The kind of the slabs."""
        return Kind(self.persistent)


class Ask(_Message, frozen=True, tag=3):
    """Ask for more slabs. One Ask of each kind may be open; Lend(done=True) or Deny with its serial closes it."""

    serial: _Serial
    slabs: _Asked
    persistent: bool = False
    age: _Seconds | None = None  # seconds since the put of the oldest page, when there is one

    @property
    def kind(self) -> Kind:
        """The kind of the slabs."""
        return Kind(self.persistent)


class Return(_WithRuns, frozen=True, tag=4):
    """Return slabs; they need not be punched. `answer` is the serial of a Revoke, or 0.

    A Revoke is answered by one or more Returns, the final one with `last`, even if it is empty.
    """

    persistent: bool = False
    answer: _Number = 0
    last: bool = True
    age: _Seconds | None = None  # seconds since the put of what is now the oldest page, when there is one

    @property
    def kind(self) -> Kind:
        """The kind of the slabs."""
        return Kind(self.persistent)


class Confirm(_Message, frozen=True, tag=5):
    """Confirm that the slabs of a Taken are not used any more. Until then they are not lent to the guest again."""

    serial: _Serial


class Report(_Message, frozen=True, tag=6):
    """Report the pool's counters: once a second while one moves, and once more after that.

    Counters are those of the ephemeral pools since the guest began.
    """

    age: _Seconds | None  # seconds since the put of the oldest page; None without ephemeral pages
    pages: _Count  # ephemeral and persistent
    used_bytes: _Count
    puts: _Count
    hits: _Count
    misses: _Count
    ghost_hits: _Count


# tmemd to guest.


class Welcome(_Message, frozen=True, tag=32):
    """Accept a Hello."""

    guest: _Number
    cap: _Slabs
    persistent_cap: _Slabs
    frozen: bool = False


class Refused(_WithLine, frozen=True, tag=33):
    """Refuse a Hello, in one line with the remedy; the connection ends. `retry`: it may be accepted later."""

    reason: _Text
    retry: bool = False


class Lend(_WithRuns, frozen=True, tag=34):
    """Lend populated slabs; `serial` is the Ask's. Several may answer one Ask, the last is `done`."""

    serial: _Serial
    persistent: bool = False
    done: bool = True

    @property
    def kind(self) -> Kind:
        """The kind of the slabs."""
        return Kind(self.persistent)


class Deny(_WithLine, frozen=True, tag=35):
    """Close an Ask without more slabs. The guest may ask again after RETRY seconds."""

    serial: _Serial
    reason: _Text


class Revoke(_Message, frozen=True, tag=36):
    """Ask for slabs back. Ephemeral slabs that are not returned within REVOKE_TIMEOUT are taken."""

    serial: _Serial
    slabs: _Some
    persistent: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of the slabs."""
        return Kind(self.persistent)


class Taken(_WithRuns, frozen=True, tag=37):
    """Name ephemeral slabs that were taken or are holes: their pages are gone. The guest confirms."""

    serial: _Serial


class Limits(_Message, frozen=True, tag=38):
    """Announce new limits; while `frozen` the guest's pools are frozen."""

    cap: _Slabs
    persistent_cap: _Slabs
    frozen: bool = False


class Evicted(_WithLine, frozen=True, tag=39):
    """Announce that all slabs and their pages are gone, persistent ones too. The guest is refused from now on."""

    reason: _Text


# tmemctl to tmemd. `guest` is a number or a name; "" in Freeze and Thaw means all.


class List(_Message, frozen=True, tag=64):
    """Ask for the table of guests."""


class SetLimits(_Message, frozen=True, tag=65):
    """Change limits of a guest; None leaves one as it is."""

    guest: _Name
    weight: _Weight | None = None
    cap: _Slabs | None = None
    floor: _Slabs | None = None
    persistent_cap: _Slabs | None = None


class Freeze(_Message, frozen=True, tag=66):
    """Freeze a guest's pools; nothing more is lent to it."""

    guest: _Text = ""


class Thaw(_Message, frozen=True, tag=67):
    """End freeze and drain."""

    guest: _Text = ""


class TakeBack(_Message, frozen=True, tag=68):
    """Revoke slabs from a guest, whatever their value; persistent ones are never taken."""

    guest: _Name
    slabs: _Some
    persistent: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of the slabs."""
        return Kind(self.persistent)


class Drain(_Message, frozen=True, tag=69):
    """Reclaim all ephemeral slabs of a guest; lend it nothing until it is thawed."""

    guest: _Name


class Resize(_Message, frozen=True, tag=70):
    """Change how much memory there is to lend."""

    slabs: _Some


class Evict(_Message, frozen=True, tag=72):
    """End a guest and free all that it holds; persistent slabs only with `lose_persistent`, else it is refused."""

    guest: _Name
    lose_persistent: bool = False


class AskTotals(_Message, frozen=True, tag=71):
    """Ask for the sums and counters."""


# tmemd to tmemctl.


class Row(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One guest in the table."""

    guest: _Number
    name: _Text
    uid: _Number
    pid: _Number
    state: _Text  # connected, away, claiming, frozen, draining, barred
    slabs: _Slabs
    ephemeral: _Slabs
    persistent: _Slabs
    weight: float
    cap: _Slabs
    floor: _Slabs
    persistent_cap: _Slabs
    age: _Seconds | None  # of the oldest page, as of now
    pages: _Count
    used_bytes: _Count
    puts: _Count
    hits: _Count
    misses: _Count
    revoked: _Count  # slabs given back when asked
    taken: _Count  # slabs taken without an answer


class Table(_Message, frozen=True, tag=96):
    """A part of the table of guests."""

    rows: Annotated[tuple[Row, ...], Meta(max_length=MAX_ROWS)]
    last: bool


class Done(_WithLine, frozen=True, tag=97):
    """The verb was carried out; `text` is a line for the person, or empty."""

    _line: ClassVar[str] = "text"

    text: _Text = ""


class Failed(_WithLine, frozen=True, tag=98):
    """The verb was refused, in one line with the remedy."""

    reason: _Text


class Totals(_Message, frozen=True, tag=99):
    """Sums and counters by name."""

    counters: Annotated[dict[_Text, int | float], Meta(max_length=512)]


FromGuest = Hello | Claim | Ask | Return | Confirm | Report
ToGuest = Welcome | Refused | Lend | Deny | Revoke | Taken | Limits | Evicted
Verb = List | SetLimits | Freeze | Thaw | TakeBack | Drain | Resize | Evict | AskTotals
Answer = Table | Done | Failed | Totals
Message = FromGuest | ToGuest | Verb | Answer


def guest_name(mountpoint: str) -> str:
    """Return the name under which the guest at a mountpoint registers, and is asked for."""
    return mountpoint.encode(errors="replace").decode()[-MAX_TEXT:]
