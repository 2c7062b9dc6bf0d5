"""Listings are shared by readers within the attribute time-out and dropped after it."""

from __future__ import annotations

import gc
import os
import time

import pytest
import trio

from tests.guestparts import MakeParts, make_parts
from tests.scheduling import in_trio
from tmemfs.inodes.stamps import SECOND, Stamps
from tmemfs.namespace.listing import Listing
from tmemfs.namespace.namespace import Namespace

__all__ = ["make_parts"]


def _listings() -> int:
    """Count the listings in memory."""
    gc.collect()
    return sum(isinstance(found, Listing) for found in gc.get_objects())


@in_trio
async def test_listings_of_a_tree_walk_are_dropped_after_the_timeout(make_parts: MakeParts) -> None:
    parts = make_parts(attr_timeout=1.0)
    listings = Namespace(parts).listings
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
async def test_a_directory_that_changes_all_the_time_has_one_listing(make_parts: MakeParts) -> None:
    parts = make_parts(attr_timeout=300.0)
    listings, before = Namespace(parts).listings, _listings()
    for _ in range(20):
        await listings.open(parts.inodes.root)
        parts.inodes.root.listing = None
    assert _listings() - before <= 2


@in_trio
async def test_a_listing_is_cached_once_its_times_are_settled(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with whole seconds whose clock is an hour behind ours."""
    parts = make_parts(attr_timeout=300.0, stamps=Stamps(own_clock=None))
    listings, root, fstat = Namespace(parts).listings, parts.inodes.root, os.fstat
    stamp = (time.time_ns() // SECOND - 3600) * SECOND

    def whole(fd: int) -> os.stat_result:
        st = fstat(fd)
        return os.stat_result(list(st), dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), stamp))

    monkeypatch.setattr(os, "fstat", whole)
    names = []
    for number in range(5):
        (parts.directory / f"n{number}").touch()  # each in the same second
        with parts.descriptors.use(root) as fd:
            listings.compare(root, os.fstat(fd))
        listing = await listings.open(root)
        names.append(f"n{number}".encode())
        assert sorted(listing.names) == names
    with parts.descriptors.use(root) as fd:
        parts.inodes.merge_stat(root, os.fstat(fd), parts.inodes.start())
        await trio.sleep(3)
        listings.compare(root, os.fstat(fd))
        settled = await listings.open(root)
        listings.compare(root, os.fstat(fd))
    assert settled is await listings.open(root) is not listing
