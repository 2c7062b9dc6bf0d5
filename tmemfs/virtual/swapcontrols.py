"""Show the swap-like file among the virtual files, and the controls that `tmemfs swapon` and `swapoff` use."""

from __future__ import annotations

from tmemfs.fuse.virtualfiles import InvalidInput
from tmemfs.hswap.swaparea import SwapArea
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.virtual.controlfiles import ControlFiles

NAME = "hswap"
RESERVE, CLEAR = "hswap_reserve", "hswap_clear"


class SwapControls:
    """The file `hswap` and the controls `hswap_reserve` and `hswap_clear` of one guest."""

    def __init__(self, files: ControlFiles, area: SwapArea, kernel: KernelCache) -> None:
        self._area = area
        self._kernel = kernel
        self._number = files.add_file(NAME, self)
        files.add_control(RESERVE, None, self._reserve)
        files.add_control(CLEAR, None, self._clear)
        self.read = area.hswap.read
        self.write = area.hswap.write

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self._area.hswap.size

    def opened(self) -> None:
        """Count an open."""
        self._area.hswap.opened()

    def closed(self) -> None:
        """Count a close; after the last one the kernel keeps no pages of the file's mappings."""
        if self._area.closed():
            self._kernel.invalidate_pages(self._number)

    async def _reserve(self, data: bytes) -> None:
        """Reserve disk space for all pages, before the file is used for swap (`1`)."""
        _expect_one(data)
        await self._area.reserve()

    async def _clear(self, data: bytes) -> None:
        """Forget all pages of a file that nobody has open, as after swapoff (`1`)."""
        _expect_one(data)
        await self._area.clear()


def _expect_one(data: bytes) -> None:
    if data.strip() != b"1":
        raise InvalidInput("the word to write is: 1")
