"""How much to read ahead of demand: as much as the device has idle time for, and while it pays.

Between the last read that a layer waits for and the first that the next one asks for, the device
has nothing to do but to read what is likely wanted. What is read in vain must fit into that time,
or it would delay demand; what is wanted anyway is only read earlier.
"""

from __future__ import annotations

DISTANCES = (1, 2)
"""Layers ahead that are foreseen; the farther ones with what the nearer ones leave."""
MEMORY = 64
"""Layers over which measurements are averaged."""
FIRST_PRECISION, LEAST_PRECISION, MOST_PRECISION = 0.75, 0.5, 0.98
"""What is assumed at first; below, reading ahead stops; above, there is nothing more to win."""
FIRST_PAUSE = 16 * MEMORY
"""Layers without reading ahead once it does not pay; each pause is twice the one before."""
LONGEST_PAUSE = 1 << 20


class Lookahead:
    """Admits bytes to be read ahead, from what was measured in the layers before."""

    def __init__(self):
        self._idle_us = self._bytes_per_us = 0.0
        self._before = (0, 0, 0)
        self._in_vain = 0.0
        self._distances = {distance: _Distance() for distance in DISTANCES}

    def begin(self, idle_us: int, read_bytes: int, busy_us: int) -> None:
        """A layer begins: the residency's counters now (time without a demanded read, bytes read,
        and time in which the device was reading)."""
        now = (idle_us, read_bytes, busy_us)
        idle, read, busy = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        self._idle_us += (idle - self._idle_us) / MEMORY
        if busy > 0:
            weight = MEMORY if self._bytes_per_us else 1
            self._bytes_per_us += (read / busy - self._bytes_per_us) / weight
        self._in_vain = self._idle_us * self._bytes_per_us
        for distance in self._distances.values():
            distance.begin()

    def room(self, distance: int) -> int:
        """Bytes that may be read now for the layer so far ahead; 0 while that does not pay."""
        found = self._distances[distance]
        return 0 if found.paused else max(0, int(self._in_vain / found.risk))

    def take(self, distance: int, size: int) -> None:
        """So many bytes are read ahead."""
        self._in_vain -= size * self._distances[distance].risk

    def learn(self, distance: int, started: int, used: int) -> None:
        """Of `started` bundles that were read for the layer so far ahead, it did use `used`."""
        if started:
            self._distances[distance].learn(used / started)

    def precision(self, distance: int) -> float:
        """The share of what was read ahead that was used."""
        return self._distances[distance].precision


class _Distance:
    """How well what lies so far ahead is foreseen."""

    def __init__(self):
        self.precision = FIRST_PRECISION
        self._pause = FIRST_PAUSE
        self._left = 0

    @property
    def risk(self) -> float:
        """The share that is read in vain."""
        return 1 - min(self.precision, MOST_PRECISION)

    @property
    def paused(self) -> bool:
        return self._left > 0

    def begin(self) -> None:
        if self._left > 0:
            self._left -= 1

    def learn(self, share: float) -> None:
        self.precision += (share - self.precision) / MEMORY
        if self.precision < LEAST_PRECISION:
            self._left = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self.precision = FIRST_PRECISION
