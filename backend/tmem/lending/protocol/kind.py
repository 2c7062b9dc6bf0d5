"""The two kinds of slabs and of pages."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """Whether tmemd may take a slab. The values are those of `persistent` in messages, and index pairs."""

    EPHEMERAL = 0  # tmemd may take it
    PERSISTENT = 1  # only the guest gives it back

    @property
    def persistent(self) -> bool:
        """The kind as messages carry it."""
        return self is Kind.PERSISTENT
