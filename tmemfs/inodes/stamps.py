"""Judge what equal time stamps prove, by how fine the backing's stamps are and by what its clock shows.

A file that others change twice within one grain of its stamps looks the same after both changes. So equal stats prove
nothing while the newest stamp is younger than a grain: git calls such an entry *racily clean* (Documentation/
technical/racy-git), Mercurial an ambiguous timestamp, and both compare the content then. A version is *settled* once
the clock that stamps has left the grain of its newest stamp: every later change gives another stamp.

The grain is read from each stamp alone, so that filesystems below one another may differ: whole seconds come from ext4
with 128-byte inodes, sshfs, HFS+ (1 s) or FAT (2 s, always even). A coarse grain that is seen by chance only makes us
wait a little longer. Whatever a stamp's digits say, many kernels take it from a clock that moves with the timer's
tick: 1 to 10 ms on Linux before 6.13 (multigrain timestamps), 15.6 ms on Windows.

The clock is the backing's, one a device. For a filesystem of this machine it is ours; a server's may be wrong by hours,
so it is only known to be past every stamp that it has given, by what has elapsed here since we saw it. Stamps that lie
in our future are not believed, as anybody can make such ones with utimes(2); at worst, a version settles a grain after
it was seen.

Pure: times are handed in.
"""

from __future__ import annotations

SECOND = 1_000_000_000
TICK = 20_000_000  # ns: longer than the tick of any kernel's clock
UNITS = (2 * SECOND, SECOND, SECOND // 10)  # coarser than a tick; what has none of them is as fine as the tick
NO_TICK = 500_000  # ns: stamps of a clock that ticks are further apart


def grain_of(stamp: int) -> int:
    """Return for how many ns after its making a stamp may be given again."""
    return TICK + next((unit for unit in UNITS if stamp % unit == 0), 0)


class Stamps:
    """What is known of the clocks and the stamps of one backing's devices."""

    def __init__(self, *, own_clock: int | None) -> None:
        self._own_clock = own_clock  # the device whose files are stamped by this machine
        self._shown: dict[int, tuple[int, float]] = {}  # the largest stamp that was believed, and when it was seen
        self._fine: set[int] = set()

    def see(self, device: int, stamp: int, now: float, wall: int) -> None:
        """Take in a stamp that was seen at `now` (monotonic seconds), when our clock showed `wall` (ns)."""
        if device != self._own_clock and self._clock(device, now, wall) < stamp <= wall:
            self._shown[device] = stamp, now

    def _clock(self, device: int, now: float, wall: int) -> int:
        """Return what a device's clock shows at least, in ns."""
        if device == self._own_clock:
            return wall
        largest, shown_at = self._shown.get(device, (-(1 << 62), now))
        return largest + int((now - shown_at) * SECOND)

    def settles_at(self, device: int, stamp: int, now: float, wall: int) -> float:
        """Return when (monotonic seconds) no change can give this stamp any more, that has been given by now."""
        grain = grain_of(stamp)
        left = min(grain, stamp + grain - self._clock(device, now, wall))
        return now + max(0, left) / SECOND

    def compare(self, device: int, before: int, after: int) -> None:
        """Take in the ctimes of one file that was looked at, then changed by us, then looked at again."""
        if 0 < after - before < NO_TICK:
            self._fine.add(device)

    def tells_apart(self, device: int) -> bool:
        """Tell whether a device gives every change that follows a look a stamp of its own (multigrain timestamps)."""
        return device in self._fine
