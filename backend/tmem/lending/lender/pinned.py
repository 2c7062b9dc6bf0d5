"""Books memory that stays in use after a punch to the user who keeps it, if that is certain.

A guest can hold references to pages of its arena, in a pipe for instance, when it gives slabs up. A punch then frees
nothing: the pages belong to no file, but stay charged to tmemd's memory cgroup. The growth of this memory since the
last measurement is booked to a user as far as all other users together gave up less than that. When it shrinks, the
booking of every user shrinks, because it may have been theirs.
"""

from __future__ import annotations

from collections import Counter


class Pinned:
    """Slabs that users certainly keep in use after a punch: `of`, by uid."""

    def __init__(self) -> None:
        self.of: Counter[int] = Counter()
        self._punched: Counter[int] = Counter()  # slabs since the last update, by uid
        self._found: int | None = None

    def punched(self, uid: int, slabs: int) -> None:
        """Add punched slabs of a user's guest."""
        self._punched[uid] += slabs

    def update(self, found: int, unreported: Counter[int]) -> None:
        """Compare the pinned slabs of all users with the last update; those of the first one are booked to nobody.

        `unreported` are slabs that may have been punched without a report.
        """
        grown = 0 if self._found is None else found - self._found
        self._found = found
        suspects = self._punched + unreported
        for uid, slabs in suspects.items():
            self.of[uid] += max(0, min(grown - (suspects.total() - slabs), slabs))
        self._punched.clear()
        self.of = +Counter({uid: slabs + min(0, grown) for uid, slabs in self.of.items()})
