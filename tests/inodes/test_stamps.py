"""The grain of time stamps, and when a version is settled."""

from __future__ import annotations

import random

import pytest

from tmemfs.inodes.stamps import NO_TICK, SECOND, TICK, Stamps, grain_of

ODD, EVEN = 1_700_000_001 * SECOND, 1_700_000_002 * SECOND
DEVICE, OTHER = 1, 2
NEVER = 1 << 62  # a clock that must not count


@pytest.mark.parametrize(
    ("stamp", "grain"),
    [
        (ODD, SECOND + TICK),
        (EVEN, 2 * SECOND + TICK),  # may be FAT's
        (ODD + SECOND // 2, SECOND // 10 + TICK),
        (ODD + 10_000_000, TICK),
        (ODD + 100, TICK),
        (ODD + 123_456_789, TICK),
    ],
)
def test_the_grain_is_read_from_the_digits_of_a_stamp(stamp: int, grain: int) -> None:
    assert grain_of(stamp) == grain


def test_a_version_settles_a_grain_after_it_was_first_seen_at_the_latest() -> None:
    stamps = Stamps(own_clock=None)
    for stamp in (ODD, ODD + 7, 4_000_000_000 * SECOND):  # the last one is made with utimes(2), in our future
        assert stamps.settles_at(DEVICE, stamp, 5.0, ODD) == pytest.approx(5.0 + grain_of(stamp) / SECOND)


def test_a_stamp_settles_by_a_later_stamp_or_by_elapsed_time() -> None:
    stamps = Stamps(own_clock=None)
    stamps.see(DEVICE, ODD, 100.0, NEVER)
    assert stamps.settles_at(DEVICE, ODD, 100.25, NEVER) == pytest.approx(101.02)
    assert stamps.settles_at(DEVICE, ODD - 10 * SECOND, 100.25, NEVER) == 100.25
    assert stamps.settles_at(DEVICE, ODD, 101.1, NEVER) == 101.1
    stamps.see(DEVICE, ODD - 5 * SECOND, 102.0, NEVER)  # an old file
    assert stamps.settles_at(DEVICE, ODD, 102.0, NEVER) == 102.0


def test_a_server_clock_that_is_wrong_is_followed() -> None:
    stamps, ours = Stamps(own_clock=None), ODD + 3600 * SECOND  # its clock is an hour behind
    stamps.see(DEVICE, ODD, 0.0, ours)
    assert stamps.settles_at(DEVICE, ODD + 123, 0.0, ours) == pytest.approx(0.02)


def test_each_device_has_its_own_clock() -> None:
    """Servers below one SOURCE; the clock of one of them is an hour behind."""
    for stamps in (Stamps(own_clock=None), Stamps(own_clock=OTHER)):
        stamps.see(OTHER, ODD, 0.0, ODD)
        late = ODD - 3600 * SECOND + 123
        assert stamps.settles_at(DEVICE, late, 0.0, ODD) == pytest.approx(0.02)
        stamps.see(DEVICE, late, 0.0, ODD)
        assert stamps.settles_at(DEVICE, late, 0.021, ODD) == 0.021


def test_stamps_in_the_future_do_not_advance_the_clock() -> None:
    stamps = Stamps(own_clock=None)
    stamps.see(DEVICE, ODD, 0.0, ODD + SECOND)
    stamps.see(DEVICE, ODD + 1000 * SECOND, 0.0, ODD + SECOND)
    assert stamps.settles_at(DEVICE, ODD + 6 * SECOND, 0.0, ODD) > 1.0


def test_our_own_clock_counts_where_it_makes_the_stamps() -> None:
    stamps = Stamps(own_clock=DEVICE)
    assert stamps.settles_at(DEVICE, ODD, 7.0, ODD + 10 * SECOND) == 7.0
    assert stamps.settles_at(DEVICE, ODD, 7.0, ODD + SECOND // 2) == pytest.approx(7.52)
    assert stamps.settles_at(DEVICE, ODD + 123, 7.0, ODD + 123 + TICK) == 7.0


@pytest.mark.parametrize("seed", range(20))
def test_no_version_is_settled_while_a_change_could_leave_it_equal(seed: int) -> None:
    """With any server clock, any grain and changes at any time, a settled stamp never comes again."""
    generator = random.Random(seed)
    unit = generator.choice([2 * SECOND, SECOND, SECOND // 10, 10_000_000, 4_000_000, 1])
    skew = generator.randrange(-(10**13), 10**13)
    stamps, true, settles = Stamps(own_clock=None), ODD, dict[int, float]()
    for _ in range(300):
        true += generator.choice([1, 1000, 3_000_000, 50_000_000, SECOND, 30 * SECOND])
        server = true + skew
        stamp, now = server - server % unit, true / SECOND
        assert settles.get(stamp, now) >= now - 1e-6, "settled, and given again"
        if generator.random() < 0.5:
            stamps.see(DEVICE, stamp, now, true)
            settles[stamp] = stamps.settles_at(DEVICE, stamp, now, true)


def test_stamps_closer_than_a_tick_prove_that_each_change_has_its_own() -> None:
    stamps = Stamps(own_clock=DEVICE)
    for before, after in ((5, 5), (5, 5 + NO_TICK), (5, 4)):
        stamps.compare(1, before, after)
    assert not stamps.tells_apart(1)
    stamps.compare(1, 5, 6)
    assert stamps.tells_apart(1)
    assert not stamps.tells_apart(2)
