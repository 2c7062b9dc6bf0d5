"""A zram device with lz4, removed at the end. Needs root."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bench.tools.children import BenchError, undisturbed

_CONTROL = Path("/sys/class/zram-control")


@contextlib.contextmanager
def zram_device(size: int) -> Iterator[int]:
    """Yield the number of a new device of `size` bytes; BenchError if there can be none."""
    if os.geteuid() != 0 or not (_CONTROL / "hot_add").exists():
        raise BenchError("zram needs root and the kernel's zram module (modprobe zram)")
    try:
        number = int((_CONTROL / "hot_add").read_text())
        try:
            settings = Path(f"/sys/block/zram{number}")
            (settings / "comp_algorithm").write_text("lz4")
            (settings / "disksize").write_text(str(size))
            yield number
        finally:
            with undisturbed():
                _remove(number)
    except OSError as error:
        raise BenchError(f"zram cannot be used here: {error}") from None


def _remove(number: int) -> None:
    """Remove a device; udev may hold it open for a moment."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            Path(f"/sys/block/zram{number}/reset").write_text("1")
            (_CONTROL / "hot_remove").write_text(str(number))
            return
        time.sleep(0.1)
