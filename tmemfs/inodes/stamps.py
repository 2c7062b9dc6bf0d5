"""Decide what equal time stamps prove, from the granularity of the backing's stamps and from its clock.

A file that others change twice within one grain of its stamps looks the same after both changes. So equal stats prove
nothing while the newest stamp is younger than one grain. Git calls such a file *racily clean*
(Documentation/technical/racy-git), Mercurial calls the time stamp ambiguous; both then compare the content. A version
is *settled* once the clock that makes the stamps has left the grain of its newest stamp: every later change gets
another stamp.

The grain is read from the digits of each stamp, because filesystems below one another differ. Whole seconds come from
ext4 with 128-byte inodes, sshfs and HFS+ (1 s), or FAT (2 s, always even). A fine stamp that looks coarse by chance
only makes us wait a little longer. Independent of its digits, a stamp may come from a clock that advances with the
timer tick: 1 to 10 ms on Linux before 6.13 (multigrain timestamps), 15.6 ms on Windows.

The clock is that of the backing, one for each device. A filesystem of this machine uses our clock. The clock of a
server may be wrong by hours; all that is known is that it has passed every stamp that it gave, plus the time elapsed
here since we saw that stamp. Stamps in our future are ignored, because anybody can set them with utimes(2). At worst, a
version settles one grain after it was seen.

Pure: times are passed in.
"""

from __future__ import annotations

SECOND = 1_000_000_000
TICK = 20_000_000  # ns: longer than the timer tick of any kernel
UNITS = (2 * SECOND, SECOND, SECOND // 10)  # ns: granularities coarser than a tick
NO_TICK = 500_000  # ns: stamps of a clock that advances by ticks are further apart


def grain_of(stamp: int) -> int:
    """Return for how many ns after a stamp was made another change may get the same stamp."""
    return TICK + next((unit for unit in UNITS if stamp % unit == 0), 0)


class Stamps:
    """What is known of the clocks and stamps of the devices of one backing."""

    def __init__(self, *, own_clock: int | None) -> None:
        self._own_clock = own_clock  # the device that uses the clock of this machine
        self._shown: dict[int, tuple[int, float]] = {}  # by device: the largest trusted stamp, and when we saw it
        self._fine: set[int] = set()  # devices with multigrain timestamps

    def see(self, device: int, stamp: int, now: float, wall: int) -> None:
        """Learn from a stamp that was seen at `now` (monotonic seconds), when our clock showed `wall` (ns)."""
        if device != self._own_clock and self._clock(device, now, wall) < stamp <= wall:
            self._shown[device] = stamp, now

    def _clock(self, device: int, now: float, wall: int) -> int:
        """Return a lower bound for the clock of a device, in ns."""
        if device == self._own_clock:
            return wall
        largest, shown_at = self._shown.get(device, (-(1 << 62), now))
        return largest + int((now - shown_at) * SECOND)

    def settles_at(self, device: int, stamp: int, now: float, wall: int) -> float:
        """Return from when on (monotonic seconds) no change can get this stamp, which some change has got by `now`."""
        grain = grain_of(stamp)
        left = min(grain, stamp + grain - self._clock(device, now, wall))
        return now + max(0, left) / SECOND

    def compare(self, device: int, before: int, after: int) -> None:
        """Learn from the ctimes of one file before and after a change of our own, with a stat in between."""
        if 0 < after - before < NO_TICK:
            self._fine.add(device)

    def tells_apart(self, device: int) -> bool:
        """Return whether a device gives every change that follows a stat a new stamp (multigrain timestamps)."""
        return device in self._fine
