"""How much to read ahead of demand: as much as the device has idle time for, and while it pays.

Between the last read that a layer waits for and the first that the next one asks for, the device
has nothing to do but to read what is likely wanted. What is read in vain must fit into that time,
or it would delay demand; what is wanted anyway is only read earlier.
"""

from __future__ import annotations

MEMORY = 64
"""Layers over which measurements are averaged."""
FIRST_PRECISION, LEAST_PRECISION, MOST_PRECISION = 0.75, 0.5, 0.98
"""What is assumed at first; below, reading ahead stops; above, there is nothing more to win."""
FIRST_PAUSE = 16 * MEMORY
"""Layers without reading ahead once it does not pay; each pause is twice the one before."""
LONGEST_PAUSE = 1 << 20


class Lookahead:
    """Admits bytes to be read ahead, from what was measured in the layers before.

    `precision` is the share of what was read ahead that the next layer did use.
    """

    def __init__(self):
        self.precision = FIRST_PRECISION
        self._idle_us = self._bytes_per_us = 0.0
        self._before = (0, 0, 0)
        self._layers_left = 0
        self._pause = FIRST_PAUSE

    def admit(self, idle_us: int, read_bytes: int, busy_us: int) -> int:
        """Bytes that may be read ahead of the next layer; 0 while reading ahead does not pay.

        Call once for each layer with the residency's counters: time without a demanded read, bytes
        read, and time in which the device was reading.
        """
        idle, read, busy = (
            now - then for now, then in zip((idle_us, read_bytes, busy_us), self._before)
        )
        self._before = (idle_us, read_bytes, busy_us)
        self._idle_us += (idle - self._idle_us) / MEMORY
        if busy > 0:
            rate = read / busy
            weight = MEMORY if self._bytes_per_us else 1
            self._bytes_per_us += (rate - self._bytes_per_us) / weight
        if self._layers_left > 0:
            self._layers_left -= 1
            if self._layers_left == 0:
                self.precision = FIRST_PRECISION
            return 0
        in_vain = 1 - min(self.precision, MOST_PRECISION)
        return int(self._idle_us * self._bytes_per_us / in_vain)

    def learn(self, started: int, used: int) -> None:
        """Of `started` bundles that were read ahead of a layer it did use `used`."""
        if not started:
            return
        self.precision += (used / started - self.precision) / MEMORY
        if self.precision < LEAST_PRECISION:
            self._layers_left = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
