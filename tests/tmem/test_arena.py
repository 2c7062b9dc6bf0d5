"""The private arena: slabs of a sealed memfd, populated on demand and punched on release."""

from __future__ import annotations

import errno
import os

import pytest

from tmem import SLAB_SIZE, EmbeddedArena


def real_bytes(arena: EmbeddedArena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def test_an_acquired_slab_has_memory_and_a_released_one_has_none() -> None:
    arena = EmbeddedArena(4 * SLAB_SIZE)
    assert {arena.acquire(False) for _ in range(4)} == {0, 1, 2, 3}
    assert real_bytes(arena) == 4 * SLAB_SIZE
    assert arena.acquire(False) is None
    arena.release(2, False)
    assert real_bytes(arena) == 3 * SLAB_SIZE
    assert arena.acquire(True) == 2
    arena.check()
    arena.close()
    arena.close()


def test_a_capacity_is_whole_slabs_and_at_least_one() -> None:
    assert EmbeddedArena(3 * SLAB_SIZE - 1).capacity == 2 * SLAB_SIZE
    assert EmbeddedArena(1).capacity == SLAB_SIZE


def test_the_memfd_can_neither_shrink_nor_grow() -> None:
    arena = EmbeddedArena(SLAB_SIZE)
    for size in (0, 2 * SLAB_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)


def test_a_slab_is_released_once_and_as_the_kind_it_was_acquired() -> None:
    arena = EmbeddedArena(SLAB_SIZE)
    slab = arena.acquire(True)
    assert slab == 0
    with pytest.raises(ValueError, match="ephemeral"):
        arena.release(slab, False)
    arena.release(slab, True)
    with pytest.raises(ValueError, match="persistent"):
        arena.release(slab, True)


def test_no_more_slabs_are_out_than_the_capacity() -> None:
    arena = EmbeddedArena(2 * SLAB_SIZE)
    assert arena.acquire(False) == 0
    assert arena.acquire(False) == 1
    assert arena.acquire(False) is None
    arena.release(0, False)
    assert arena.acquire(False) is not None
    arena.check()


@pytest.mark.parametrize(("code", "raised"), [(errno.ENOSPC, 0), (errno.ENOMEM, 0), (errno.EIO, 1)])
def test_no_memory_is_no_slab_and_other_errors_are_raised(
    code: int, raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = EmbeddedArena(SLAB_SIZE)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    if raised:
        with pytest.raises(OSError, match="error"):
            arena.acquire(False)
    else:
        assert arena.acquire(False) is None
    monkeypatch.undo()
    assert arena.acquire(False) == 0
    arena.check()
