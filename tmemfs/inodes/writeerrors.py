"""Owe the errors of one file's write-backs to its open files: each is told each error once, as Linux does (errseq_t).

A write-back that is tried again and fails again is the same error. One that nobody was told of is owed to who opens the
file next, too: whoever wrote may have closed it.
"""

from __future__ import annotations


class WriteErrors:
    """Failed write-backs of one file, counted, so that an open file can remember how many it knows of."""

    __slots__ = ("count", "failing", "last", "told")

    def __init__(self) -> None:
        self.count = 0
        self.told = 0  # of these, somebody was told
        self.last: OSError | None = None
        self.failing = False  # the last write-back failed

    def record_failure(self, error: OSError) -> bool:
        """Take in that a write-back failed; tell whether that is news."""
        news = not self.failing
        self.count += news
        self.failing, self.last = True, OSError(error.errno, error.strerror)  # without the frames that it went through
        return news

    def record_success(self) -> None:
        """Take in that nothing is left to be written back."""
        self.failing = False

    def unreported(self, known: int) -> OSError | None:
        """Tell the error to somebody who knows of so many; None if that is all."""
        if known >= self.count:
            return None
        self.told = self.count
        return self.last

    def check(self) -> None:
        """Raise AssertionError unless what was told has happened."""
        assert 0 <= self.told <= self.count
        assert (self.last is None) == (self.count == 0)
        assert self.count or not self.failing
