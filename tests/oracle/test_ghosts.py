"""Unit tests of the ghost list of the Python pool; not part of the contract."""

from __future__ import annotations

from tests.oracle.ghosts import GhostList, tag_of


def test_a_ghost_is_held_for_as_many_evictions_as_the_window() -> None:
    ghosts = GhostList()
    ghosts.add(tag_of(0, 1, 1), 100)
    for index in range(9):
        ghosts.add(tag_of(0, 2, index), 100)
    assert ghosts.holds(tag_of(0, 1, 1), 10)
    assert not ghosts.holds(tag_of(0, 1, 1), 9)
    ghosts.discard(tag_of(0, 1, 1))
    assert not ghosts.holds(tag_of(0, 1, 1), 10)
    ghosts.check()


def test_a_full_window_is_held_nearly_whole_in_few_bytes() -> None:
    ghosts, window = GhostList(), 50_000
    for index in range(3 * window):
        ghosts.add(tag_of(0, 7, index), window)
    held = sum(ghosts.holds(tag_of(0, 7, index), window) for index in range(2 * window, 3 * window))
    older = sum(ghosts.holds(tag_of(0, 7, index), window) for index in range(2 * window))
    assert held > 0.95 * window
    assert older < 0.001 * window
    assert ghosts.bytes <= 25 * window
    ghosts.check()


def test_ghosts_survive_the_growth_of_the_table() -> None:
    ghosts = GhostList()
    for index in range(60):
        ghosts.add(tag_of(0, 1, index), 60)
    for index in range(40):
        ghosts.add(tag_of(0, 2, index), 1000)
    assert sum(ghosts.holds(tag_of(0, 1, index), 1000) for index in range(60)) >= 55
    assert all(ghosts.holds(tag_of(0, 2, index), 1000) for index in range(40))
