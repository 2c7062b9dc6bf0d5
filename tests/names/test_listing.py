"""Listings: shared by readers within the attribute time-out, and gone after it."""

from __future__ import annotations

import gc

import trio

from tests.parts import MakeParts, in_trio, make_parts
from tmemfs.names.listing import Listing, Listings

__all__ = ["make_parts"]


def _listings() -> int:
    """Count the listings in memory."""
    gc.collect()
    return sum(isinstance(found, Listing) for found in gc.get_objects())


@in_trio
async def test_a_walk_leaves_no_listing_behind_once_the_timeout_is_over(make_parts: MakeParts) -> None:
    parts = make_parts(attr_timeout=1.0)
    listings = Listings(parts.backing, parts.inodes, parts.descriptors)
    directories = []
    for number in range(20):
        (parts.directory / f"d{number}").mkdir()
        directories.append(parts.lookup(f"d{number}"))
    for directory in directories:
        listing = await listings.open(directory)
        assert await listings.open(directory) is listing
        await trio.sleep(0.3)
    assert sum(directory.listing is not None for directory in directories) <= 4
    assert await listings.open(directories[0]) is directories[0].listing


@in_trio
async def test_of_a_directory_that_changes_all_the_time_one_listing_is_kept(make_parts: MakeParts) -> None:
    parts = make_parts(attr_timeout=300.0)
    listings, before = Listings(parts.backing, parts.inodes, parts.descriptors), _listings()
    for _ in range(20):
        await listings.open(parts.inodes.root)
        parts.inodes.root.listing = None
    assert _listings() - before <= 2
