"""The engine's pool and bare lz4 with xxh3, each in a loop in C: `bench/native/poolalone.c`.

The library is built from the engine's sources with the flags of the extension, anew for each run.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.tools.children import ROOT, BenchError, run
from bench.tools.content import PAGE_SIZE, half_compressible
from tmem import SLAB_SIZE

_FLAGS = ("-std=c11", "-O2", "-g", "-D_GNU_SOURCE", "-pthread", "-shared", "-fPIC")
_TEMPLATES = 2048
_SLOTS = SLAB_SIZE // (PAGE_SIZE // 2)  # 2:1 pages in a slab
_SPARE_SLABS = 64


class Native:
    """The library, and the pages that its loops are for: 2:1 compressible, told apart by their first bytes."""

    def __init__(self, folder: Path) -> None:
        path = folder / "poolalone.so"
        engine = ROOT / "backend/engine"
        sources = [ROOT / "bench/native/poolalone.c", *sorted(engine.glob("*.c"))]
        libraries = ["-llz4", "-lxxhash", "-lm"]
        run(["cc", *_FLAGS, "-I", engine, *sources, *libraries, "-o", path], seconds=120)
        self.lib = ctypes.CDLL(str(path))
        for name in ("pool_fill", "pool_put", "pool_get", "pool_miss", "bare_put", "bare_get"):
            getattr(self.lib, name).restype = ctypes.c_double
        for name in ("pool_new", "bare_new"):
            getattr(self.lib, name).restype = ctypes.c_void_p
        self.templates = b"".join(half_compressible(_TEMPLATES, seed=8))

    def sample(self, numbers: Sequence[int]) -> Sample:
        """Return the pages of these numbers."""
        return Sample(self, numbers)

    @contextlib.contextmanager
    def bare(self, count: int) -> Iterator[Bare]:
        """Yield bare lz4 and xxh3, for samples of up to so many pages."""
        handle = ctypes.c_void_p(self.lib.bare_new(ctypes.c_uint64(count)))
        if not handle:
            raise BenchError("there is no memory for the bare side")
        try:
            yield Bare(self.lib, handle)
        finally:
            self.lib.bare_free(handle)

    @contextlib.contextmanager
    def pool(self, pages: int) -> Iterator[NativePool]:
        """Yield a pool with the pages of the numbers below `pages`."""
        slabs = pages // _SLOTS + _SPARE_SLABS
        handle = ctypes.c_void_p(self.lib.pool_new(ctypes.c_uint32(slabs)))
        if not handle:
            raise BenchError("the engine could not be started")
        try:
            _checked(self.lib.pool_fill(handle, self.templates, ctypes.c_uint32(_TEMPLATES), ctypes.c_uint64(pages)))
            yield NativePool(self.lib, handle)
        finally:
            self.lib.pool_free(handle)


class Sample:
    """Some pages in memory, in an order."""

    def __init__(self, native: Native, numbers: Sequence[int]) -> None:
        self.count = ctypes.c_uint64(len(numbers))
        self.numbers = (ctypes.c_uint64 * len(numbers))(*numbers)
        self.pages = ctypes.create_string_buffer(len(numbers) * PAGE_SIZE)
        native.lib.make_pages(self.pages, native.templates, ctypes.c_uint32(_TEMPLATES), self.numbers, self.count)

    def microseconds(self, nanoseconds: float) -> float:
        """Return the microseconds of one page of a loop over the sample."""
        return _checked(nanoseconds) / 1e3 / self.count.value


class Bare:
    """The limit: every page is compressed and its checksum kept, and back."""

    def __init__(self, lib: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._lib, self._handle = lib, handle

    def costs(self, sample: Sample) -> dict[str, float]:
        """Return the microseconds of a put and of a get of a page."""
        put = sample.microseconds(self._lib.bare_put(self._handle, sample.pages, sample.count))
        get = sample.microseconds(self._lib.bare_get(self._handle, sample.numbers, sample.count))
        return {"get": get, "put": put}


class NativePool:
    """A filled pool of the engine."""

    def __init__(self, lib: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._lib, self._handle = lib, handle

    def costs(self, sample: Sample) -> dict[str, float]:
        """Return the microseconds of a get, a failed get and a put of a page; the pool is full again afterwards."""
        get = sample.microseconds(self._lib.pool_get(self._handle, sample.numbers, sample.count))
        failed = sample.microseconds(self._lib.pool_miss(self._handle, sample.numbers, sample.count))
        put = sample.microseconds(self._lib.pool_put(self._handle, sample.pages, sample.count))
        return {"get": get, "put": put, "failed_get": failed}


def _checked(nanoseconds: float) -> float:
    if nanoseconds < 0:
        raise BenchError("a page was refused, lost or wrong")
    return nanoseconds
