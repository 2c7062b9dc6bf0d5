"""Make a fast directory slow, for experiments: latency, bandwidth and a queue depth, as a device has them.

Requests overlap up to `depth`; each waits `latency`, and their bytes share one line of `bandwidth` bytes a second.
The waits are trio's, so a throttled request holds no thread.
"""

from __future__ import annotations

import trio

from tmemfs.config import Throttle


class ThrottleGate:
    """Delay requests as the settings say."""

    def __init__(self, settings: Throttle) -> None:
        self._settings = settings
        self._depth = trio.CapacityLimiter(settings.depth)
        self._line_free_at = 0.0  # trio clock, seconds

    async def delay(self, size: int) -> None:
        """Wait as long as a request of `size` bytes takes."""
        async with self._depth:
            now = trio.current_time()
            done = now + self._settings.latency
            if self._settings.bandwidth:
                start = max(self._line_free_at, now)
                self._line_free_at = start + size / self._settings.bandwidth
                done = max(done, self._line_free_at + self._settings.latency)
            await trio.sleep_until(done)
