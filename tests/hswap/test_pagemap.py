"""The page map: one location for each page, counts by location, and the coldest pages."""

from __future__ import annotations

import random
from typing import Any

from tmemfs.hswap.pagemap import FIRST_SLOT, HOLE, LOST, POOL, PageMap


def test_every_page_is_a_hole_at_first() -> None:
    pagemap = PageMap(10)
    assert [pagemap.location(page) for page in range(10)] == [HOLE] * 10
    assert pagemap.coldest(10) == []
    pagemap.check()


def test_pages_are_counted_by_location() -> None:
    pagemap = PageMap(10)
    for page, location in enumerate((POOL, POOL, FIRST_SLOT, LOST, FIRST_SLOT + 1)):
        pagemap.set_location(page, location)
    assert (pagemap.pool_pages, pagemap.overflow_pages, pagemap.lost_pages) == (2, 2, 1)
    pagemap.set_location(0, FIRST_SLOT + 2)
    pagemap.set_location(2, HOLE)
    assert (pagemap.pool_pages, pagemap.overflow_pages, pagemap.lost_pages) == (1, 2, 1)
    pagemap.check()
    pagemap.clear()
    assert (pagemap.pool_pages, pagemap.overflow_pages, pagemap.lost_pages) == (0, 0, 0)
    pagemap.check()


def test_the_coldest_pages_are_the_least_recently_used() -> None:
    pagemap = PageMap(4096)
    for page in range(4096):
        pagemap.set_location(page, POOL)
    for page in range(0, 4096, 2):
        pagemap.record_access(page)
    coldest = pagemap.coldest(1024)
    assert len(coldest) == 1024
    assert all(page % 2 for page in coldest), "none that was accessed again"
    assert max(coldest) < 2048 + 512, "those that were written first come first"
    pagemap.check()


def test_the_order_of_use_survives_a_renumbering_of_the_generations() -> None:
    pagemap = PageMap(256)
    for page in range(256):
        pagemap.set_location(page, POOL)
    hot = random.Random(1).sample(range(256), 64)
    for _ in range(2000):  # more generations than there are numbers
        for page in hot:
            pagemap.record_access(page)
    cold = pagemap.coldest(192)
    assert set(cold) == set(range(256)) - set(hot)
    assert set(pagemap.coldest(256)) == set(range(256))
    pagemap.check()


def test_pages_that_left_the_pool_are_not_among_the_coldest() -> None:
    pagemap = PageMap(8)
    for page in range(8):
        pagemap.set_location(page, POOL)
    for page, location in ((0, HOLE), (1, LOST), (2, FIRST_SLOT)):
        pagemap.set_location(page, location)
    assert sorted(pagemap.coldest(8)) == [3, 4, 5, 6, 7]


def test_the_coldest_pages_equal_those_of_a_full_sort() -> None:
    chance, pagemap = random.Random(2), PageMap(300)
    for _ in range(3000):  # the generations are renumbered in between
        for page in chance.choices(range(300), k=chance.randrange(40)):
            if pagemap.location(page) != POOL:
                pagemap.set_location(page, POOL)
            else:
                pagemap.record_access(page)
        count = chance.randrange(1, 40)
        in_pool = [page for page in range(300) if pagemap.location(page) == POOL]
        coldest = pagemap.coldest(count)
        assert coldest == sorted(in_pool, key=pagemap._generations.__getitem__)[:count]
        for page in coldest[: chance.randrange(count)]:  # the others are in use
            pagemap.set_location(page, HOLE)
        pagemap.check()


class Searched(bytearray):
    """Bytes that count the searches in them."""

    searches = 0

    def find(self, *arguments: Any) -> int:
        """Search."""
        self.searches += 1
        return super().find(*arguments)


def test_moving_all_pages_out_searches_each_generation_once() -> None:
    pagemap, pages, batch = PageMap(8192), 8192, 8
    for page in range(pages):
        pagemap.set_location(page, POOL)
    assert pagemap._generation > 10
    pagemap._generations = searched = Searched(pagemap._generations)
    while coldest := pagemap.coldest(batch):
        for page in coldest:
            pagemap.set_location(page, HOLE)
    assert searched.searches <= pages + pages // batch + 256
