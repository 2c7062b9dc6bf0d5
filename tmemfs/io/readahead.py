"""Decide how far to read ahead, after Linux's on-demand readahead (Wu et al., OLS 2007). No I/O, no clock.

A read that starts where the last one ended is sequential. The window starts at MIN_PAGES and doubles up to MAX_PAGES.
When the reader reaches the marker in the middle of the window, the next window is read in the background. A read at
another position ends the stream, so random reads cause no read-ahead.
"""

from __future__ import annotations

MIN_PAGES = 32  # 128 KiB
MAX_PAGES = 512  # 2 MiB
NO_MARKER = 1 << 62


class Readahead:
    """The read-ahead state of one open file."""

    __slots__ = ("edge", "marker", "max_pages", "next_page", "window")

    def __init__(self, max_pages: int = MAX_PAGES) -> None:
        self.max_pages = min(MAX_PAGES, max_pages)
        self.next_page = 0  # a first read at offset 0 counts as sequential, as in Linux
        self.window = 0
        self.marker = NO_MARKER  # all that the hit path looks at
        self.edge = 0  # first page that was not read ahead

    def is_sequential(self, first: int) -> bool:
        """Return whether a read from page `first` on continues the stream; it may start within the last page."""
        return first == self.next_page or first + 1 == self.next_page

    def miss(self, first: int, last: int) -> int:
        """Return how many pages to read beyond `last` together with the missing pages first..last."""
        if not self.is_sequential(first):
            self.window, self.marker = 0, NO_MARKER
            return 0
        self.window = min(self.max_pages, max(MIN_PAGES, 2 * self.window, last - first + 1))
        if self.window < MIN_PAGES:
            return 0  # the cache is so small that read-ahead would evict its own pages
        self.edge = last + 1 + self.window
        self.marker = last + 1 + self.window // 2
        return self.window

    def reached_marker(self, first: int) -> tuple[int, int]:
        """Return the pages (first, count) to read ahead after a read passed the marker; count 0 for none."""
        if not self.is_sequential(first):
            self.marker = NO_MARKER
            return 0, 0
        start = self.edge
        self.window = min(self.max_pages, 2 * self.window)
        self.edge = start + self.window
        self.marker = start
        return start, self.window
