"""Memory that was punched and lives on: whose it is, as far as that is certain.

A guest may hold references to the pages of its arena, in a pipe for instance, when it gives their slabs up. Punching
then frees nothing: the pages are in no file any more, but they stay charged to tmemd. So what is charged and in no
statistics is compared with what it was at the last look. Of what was added a user is blamed for what the others cannot
have caused, who gave up less since; and of what went away anything may have been its.
"""

from __future__ import annotations

from collections import Counter


class Pinned:
    """Slabs that users keep from being freed, at the least. `of` has them by uid."""

    def __init__(self) -> None:
        self.of: Counter[int] = Counter()
        self._punched: Counter[int] = Counter()  # slabs since the last look, by uid
        self._found: int | None = None

    def punched(self, uid: int, slabs: int) -> None:
        """Note that slabs of a user's guest were punched."""
        self._punched[uid] += slabs

    def look(self, found: int, unsaid: Counter[int]) -> None:
        """Take in how many slabs live on, whoever keeps them; what there was at the first look is nobody's.

        `unsaid` are slabs that may have been punched although nobody said so yet.
        """
        grown = 0 if self._found is None else found - self._found
        self._found = found
        suspects = self._punched + unsaid
        for uid, slabs in suspects.items():
            self.of[uid] += max(0, min(grown - (suspects.total() - slabs), slabs))
        self._punched.clear()
        self.of = +Counter({uid: slabs + min(0, grown) for uid, slabs in self.of.items()})
