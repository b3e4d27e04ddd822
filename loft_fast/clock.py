"""Wall time by stage."""

from __future__ import annotations

import time


class Clock:
    """Seconds between laps, by the name of the stage that a lap ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the stage `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
