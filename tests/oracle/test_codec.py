"""Unit tests of the codec of the Python pool; not part of the contract."""

from __future__ import annotations

import random

import lz4.block
import pytest

from tests.oracle import codec
from tests.tmem.faultysource import filled, page_of
from tmem import PAGE_SIZE


@pytest.mark.parametrize("word", [0, 1, 0xFF, 0x0123456789ABCDEF, 2**64 - 1])
def test_a_same_filled_page_is_its_word(word: int) -> None:
    assert codec.encode(filled(word)) == (b"", word)
    assert codec.fill(word) == filled(word)


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 2048, 4087, 4088, 4095])
def test_one_other_byte_makes_a_page_not_same_filled(at: int) -> None:
    page = bytearray(PAGE_SIZE)
    page[at] = 1
    stored, _ = codec.encode(bytes(page))
    assert stored
    assert codec.decode(stored) == page


@pytest.mark.parametrize("size", [64, 500, 2000, 3000])
def test_a_compressible_page_is_stored_smaller(size: int) -> None:
    page = page_of(1, size)
    assert codec.encode(page, compress=False)[0] == page
    stored, digest = codec.encode(page)
    assert len(stored) <= codec.COMPRESSED_MAX
    assert codec.checksum(stored) == digest
    assert codec.decode(stored) == page


@pytest.mark.parametrize("size", [3200, PAGE_SIZE])
def test_a_page_that_hardly_compresses_is_stored_raw(size: int) -> None:
    page = page_of(2, size)
    stored, _ = codec.encode(page)
    assert stored == page
    assert codec.decode(stored) == page


def test_decoding_anything_but_a_page_is_an_error() -> None:
    stored, _ = codec.encode(page_of(3, 2000))
    noise = random.Random(4)
    for bad in (stored[:-1], b"\x00", noise.randbytes(2000), lz4.block.compress(b"short" * 20, store_size=False)):
        with pytest.raises(codec.CodecError):
            codec.decode(bad)
