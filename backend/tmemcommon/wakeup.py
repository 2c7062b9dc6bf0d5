"""Wake one task from calls that do not wait."""

from __future__ import annotations

import trio


class Wakeup:
    """A flag that one task waits for. A `set` while nobody waits is kept."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Wake the task, or let its next wait return at once."""
        self._event.set()

    async def wait(self) -> None:
        """Wait until the flag is set, and clear it."""
        await self._event.wait()
        self._event = trio.Event()
