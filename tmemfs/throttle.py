"""Imitate a slow device for experiments (`--throttle`): latency, bandwidth and queue depth.

Up to `depth` requests overlap. Each waits `latency`, and all share `bandwidth` bytes per second. The waits are trio
sleeps, so a delayed request holds no thread.
"""

from __future__ import annotations

import trio

from tmemfs.config import Throttle


class ThrottleGate:
    """Delays the requests of one guest."""

    def __init__(self, settings: Throttle) -> None:
        self._settings = settings
        self._depth = trio.CapacityLimiter(settings.depth)
        self._bandwidth_free_at = 0.0  # trio clock, seconds

    async def delay(self, size: int) -> None:
        """Wait as long as the device needs for a request of `size` bytes."""
        async with self._depth:
            now = trio.current_time()
            done = now + self._settings.latency
            if self._settings.bandwidth:
                start = max(self._bandwidth_free_at, now)
                self._bandwidth_free_at = start + size / self._settings.bandwidth
                done = max(done, self._bandwidth_free_at + self._settings.latency)
            await trio.sleep_until(done)
