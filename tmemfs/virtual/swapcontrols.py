"""The virtual file `hswap`, and the controls that `tmemfs swapon` and `tmemfs swapoff` use."""

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
        self._hswap = area.hswap
        self._kernel = kernel
        self.size = area.hswap.size
        self.read = area.hswap.read
        self.write = area.hswap.write
        self.opened = area.hswap.opened
        self._number = files.add_file(NAME, self)
        files.add_control(RESERVE, None, self._reserve)
        files.add_control(CLEAR, None, self._clear)

    def closed(self) -> None:
        """Count a close. After the last one, drop the pages that the kernel keeps of mappings of the file."""
        self._hswap.closed()
        if not self._hswap.opens:
            self._kernel.invalidate_pages(self._number)

    async def _reserve(self, data: bytes) -> None:
        """Reserve disk space for all pages, before the file is used for swap (`1`)."""
        _expect_one(data)
        await self._area.reserve()

    async def _clear(self, data: bytes) -> None:
        """Forget all pages, after swapoff (`1`). Raise OSError while the file is open."""
        _expect_one(data)
        await self._area.clear()


def _expect_one(data: bytes) -> None:
    if data.strip() != b"1":
        raise InvalidInput("the word to write is: 1")
