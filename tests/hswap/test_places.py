"""Places: one for each page, counted, and the coldest ones found."""

from __future__ import annotations

import random
from typing import Any

from tmemfs.hswap.places import FIRST_SLOT, LOST, NOWHERE, POOL, Places


def test_every_page_begins_nowhere() -> None:
    places = Places(10)
    assert [places.where(page) for page in range(10)] == [NOWHERE] * 10
    assert places.coldest(10) == []
    places.check()


def test_pages_are_counted_where_they_are() -> None:
    places = Places(10)
    for page, place in enumerate((POOL, POOL, FIRST_SLOT, LOST, FIRST_SLOT + 1)):
        places.move(page, place)
    assert (places.pool_pages, places.overflow_pages, places.lost_pages) == (2, 2, 1)
    places.move(0, FIRST_SLOT + 2)
    places.move(2, NOWHERE)
    assert (places.pool_pages, places.overflow_pages, places.lost_pages) == (1, 2, 1)
    places.check()
    places.clear()
    assert (places.pool_pages, places.overflow_pages, places.lost_pages) == (0, 0, 0)
    places.check()


def test_the_coldest_are_those_that_were_used_longest_ago() -> None:
    places = Places(4096)
    for page in range(4096):
        places.move(page, POOL)
    for page in range(0, 4096, 2):
        places.touch(page)
    coldest = places.coldest(1024)
    assert len(coldest) == 1024
    assert all(page % 2 for page in coldest), "none that was touched afterwards"
    assert max(coldest) < 2048 + 512, "and those that were written first before the others"
    places.check()


def test_the_order_of_use_survives_when_the_generations_are_numbered_anew() -> None:
    places = Places(256)
    for page in range(256):
        places.move(page, POOL)
    hot = random.Random(1).sample(range(256), 64)
    for _ in range(2000):  # more generations than there are numbers
        for page in hot:
            places.touch(page)
    cold = places.coldest(192)
    assert set(cold) == set(range(256)) - set(hot)
    assert set(places.coldest(256)) == set(range(256))
    places.check()


def test_pages_that_left_the_pool_are_not_among_the_coldest() -> None:
    places = Places(8)
    for page in range(8):
        places.move(page, POOL)
    for page, place in ((0, NOWHERE), (1, LOST), (2, FIRST_SLOT)):
        places.move(page, place)
    assert sorted(places.coldest(8)) == [3, 4, 5, 6, 7]


def test_the_coldest_are_the_same_as_if_all_pages_were_looked_at() -> None:
    chance, places = random.Random(2), Places(300)
    for _ in range(3000):  # some generations are numbered anew
        for page in chance.choices(range(300), k=chance.randrange(40)):
            if places.where(page) != POOL:
                places.move(page, POOL)
            else:
                places.touch(page)
        count = chance.randrange(1, 40)
        by_age = sorted((places._age[page], page) for page in range(300) if places.where(page) == POOL)
        coldest = places.coldest(count)
        assert coldest == [page for _, page in by_age[:count]]
        for page in coldest[: chance.randrange(count)]:  # the others were in use
            places.move(page, NOWHERE)
        places.check()


class Searched(bytearray):
    """Bytes that count how often they are searched."""

    searches = 0

    def find(self, *arguments: Any) -> int:
        """Search."""
        self.searches += 1
        return super().find(*arguments)


def test_moving_all_pages_out_searches_each_generation_once() -> None:
    places, pages, batch = Places(8192), 8192, 8
    for page in range(pages):
        places.move(page, POOL)
    assert places._generation > 10
    places._age = searched = Searched(places._age)
    while coldest := places.coldest(batch):
        for page in coldest:
            places.move(page, NOWHERE)
    assert searched.searches <= pages + pages // batch + 256
