"""What tmemd accepts as an arena, and which slabs populating and punching change."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lending.fakeguest import SEALS, make_arena
from tmem.arena import PAGE_SIZE, SLAB_SIZE, punch
from tmem.lending.daemon.arenas import (
    ArenaRefused,
    Arenas,
    file_id,
    is_populated,
    populate,
    populated_bytes,
    validate,
)

SLABS = 64


@pytest.fixture
def arena() -> Iterator[int]:
    fd = make_arena(SLABS)
    yield fd
    os.close(fd)


def readonly(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)


def pathlike(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_PATH)


def pipe(fd: int) -> int:
    ours, others = os.pipe()
    os.close(others)
    return ours


def device(fd: int) -> int:
    return os.open("/dev/zero", os.O_RDWR)


def directory(fd: int) -> int:
    return os.open("/dev/shm", os.O_RDONLY)


def unsealed(fd: int) -> int:
    return make_arena(SLABS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)


def shrinkable(fd: int) -> int:
    return make_arena(SLABS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def growable(fd: int) -> int:
    return make_arena(SLABS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)


def write_sealed(fd: int) -> int:
    return make_arena(SLABS, SEALS | fcntl.F_SEAL_WRITE)


def future_write_sealed(fd: int) -> int:
    return make_arena(SLABS, SEALS | 0x10)


def too_small(fd: int) -> int:
    return make_arena(SLABS - 1)


def too_large(fd: int) -> int:
    return make_arena(SLABS + 1)


def odd(fd: int) -> int:
    fd = os.memfd_create("odd", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SLABS * SLAB_SIZE - 1)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def tmpfile(fd: int) -> int:
    fd = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE)
    os.ftruncate(fd, SLABS * SLAB_SIZE)
    return fd


KINDS = (
    (readonly, "written"),
    (pathlike, "memfd"),
    (pipe, "memfd"),
    (device, "memfd"),
    (directory, "memfd|sealed"),
    (unsealed, "sealed"),
    (shrinkable, "sealed"),
    (growable, "sealed"),
    (write_sealed, "written"),
    (future_write_sealed, "written"),
    (too_small, "bytes"),
    (too_large, "bytes"),
    (odd, "bytes"),
    (tmpfile, "sealed"),
)


def test_a_sealed_memfd_of_the_promised_size_is_accepted(arena: int) -> None:
    validate(arena, SLABS)
    assert populated_bytes(arena) == 0


@pytest.mark.parametrize(("make", "reason"), KINDS, ids=lambda made: getattr(made, "__name__", ""))
def test_any_other_descriptor_is_refused_with_a_reason(arena: int, make: Callable[[int], int], reason: str) -> None:
    other = make(arena)
    try:
        with pytest.raises(ArenaRefused, match=reason):
            validate(other, SLABS)
    finally:
        os.close(other)


def test_a_memfd_on_huge_pages_is_refused() -> None:
    try:
        fd = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"this kernel makes no memfd on huge pages: {error}")
    try:
        os.ftruncate(fd, 4 << 20)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        with pytest.raises(ArenaRefused, match="huge"):
            validate(fd, (4 << 20) // SLAB_SIZE)
    finally:
        os.close(fd)


def test_a_closed_descriptor_is_refused(arena: int) -> None:
    other = os.dup(arena)
    os.close(other)
    with pytest.raises(ArenaRefused):
        validate(other, SLABS)


def test_exactly_the_named_slabs_are_populated_and_punched(arena: int) -> None:
    populate(arena, 3, 16)
    assert populated_bytes(arena) == 16 * SLAB_SIZE
    populate(arena, 3, 16)
    assert populated_bytes(arena) == 16 * SLAB_SIZE
    punch(arena, 4, 10)
    assert populated_bytes(arena) == 6 * SLAB_SIZE
    punch(arena, 0, SLABS)
    assert populated_bytes(arena) == 0


def test_a_populated_slab_is_told_from_one_with_holes(arena: int) -> None:
    populate(arena, 0, 1)
    assert is_populated(arena, 0), "populated and never written"
    os.pwrite(arena, b"x" * PAGE_SIZE, SLAB_SIZE)
    assert not is_populated(arena, 1), "only one page is populated"
    assert not is_populated(arena, 2)
    assert populated_bytes(arena) == SLAB_SIZE, "partly populated slabs are punched"


def test_all_descriptors_of_a_memfd_have_the_same_file_id(arena: int, tmp_path: Path) -> None:
    other, copy = make_arena(SLABS), os.dup(arena)
    assert file_id(arena) == file_id(copy) != file_id(other)
    os.close(other)
    os.close(copy)


def test_an_arena_is_found_by_its_memfd_and_released_once() -> None:
    with contextlib.closing(Arenas()) as arenas:
        for guest in (1, 2):
            arenas.add(guest, make_arena(SLABS), SLABS, 1000)
        arena = arenas.get(1)
        assert arena is not None
        assert arenas.find_owner(arena.file_id) == 1
        arenas.release(1)
        assert arenas.find_owner(arena.file_id) is None
        assert arenas.get(1) is None
        assert arenas.get(2) is not None
