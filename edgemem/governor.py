"""Gives slots back before the system has to page: watches what shows that memory is short.

A process that is a little too large for what the machine has left does not run a little slower:
the system evicts pages that are needed in the same moment. Major faults of this process show it
coming, and so does the time in which somebody waited for memory (pressure stall information,
Linux) where little of it is left on the whole machine: others may have limits of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from . import memory

INTERVAL_S = 0.1
"""Time between two looks."""
FAULTS_PER_S = 50
STALLED_SHARE, LEFT_SHARE = 0.05, 0.1
"""Signs: so many pages read back in a second, or such a share of time spent waiting for memory
while no more than such a share of it is left."""
STEP = 16
"""A sign costs this part of what may be withheld; calm gives it back."""
CALM_S = 10.0

_PRESSURE = Path("/proc/pressure/memory")


def stalled_us(path: Path = _PRESSURE) -> int:
    """Microseconds since boot in which some task waited for memory; 0 where nobody counts them."""
    try:
        match = re.search(r"^some .*total=(\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


class Governor:
    """Says how many bytes to withhold from the slots, as long as memory is short."""

    def __init__(
        self, clock: Callable[[], float] = monotonic,
        faults: Callable[[], int] = memory.major_faults,
        stalled: Callable[[], int] = stalled_us,
        left: Callable[[], float] = memory.available_share,
    ):  # fmt: skip
        self._clock, self._faults, self._stalled, self._left = clock, faults, stalled, left
        self._withheld = 0
        self._seen: tuple[float, int, int] | None = None
        self._calm_since = 0.0

    def withheld(self, most: int) -> int:
        """Bytes to withhold now, of at most `most`. Call it often: it looks when it is time."""
        now = self._clock()
        if self._seen is None or now - self._seen[0] >= INTERVAL_S:
            self._look(now, most)
        return min(self._withheld, most)

    def _look(self, now: float, most: int) -> None:
        faults, stalled = self._faults(), self._stalled()
        if self._seen is None:
            self._seen, self._calm_since = (now, faults, stalled), now
            return
        then, old_faults, old_stalled = self._seen
        self._seen = (now, faults, stalled)
        seconds = now - then
        short = faults - old_faults > FAULTS_PER_S * max(seconds, 1.0)
        if (stalled - old_stalled) / 1e6 > STALLED_SHARE * seconds:
            short = short or self._left() < LEFT_SHARE
        if short:
            self._withheld = min(most, self._withheld + most // STEP)
            self._calm_since = now
        elif self._withheld and now - self._calm_since >= CALM_S:
            self._withheld = max(0, self._withheld - most // STEP)
            self._calm_since = now
