"""How much to read ahead of demand: as much as the device has idle time for, and while it pays.

Between the last read that a layer waits for and the first that the next one asks for, the device
has nothing to do but to read what is likely wanted. What is read in vain must fit into that time,
or it would delay demand; what is wanted anyway is only read earlier.
"""

from __future__ import annotations

MEMORY = 64
"""Layers over which measurements are averaged."""
LONGEST_IDLE_US = 100_000
"""Idle time of one layer that counts: in a longer one nobody ran the model."""
FIRST_PRECISION, LEAST_PRECISION, MOST_PRECISION = 0.75, 0.5, 0.98
"""What is assumed at first; below, reading ahead stops; above, there is nothing more to win."""
FIRST_PAUSE = 16 * MEMORY
"""Layers without reading ahead once it does not pay; each pause is twice the one before."""
LONGEST_PAUSE = 1 << 20


class Lookahead:
    """Admits bytes to be read ahead, from what was measured in the layers before.

    `precision` is the share of what was foreseen, and not in memory, that the next layer did use.
    """

    def __init__(self):
        self.precision = FIRST_PRECISION
        self._idle_us = self._bytes_per_us = 0.0
        self._before = (0, 0, 0)
        self._pause, self._layers_left = FIRST_PAUSE, 0

    def admit(self, idle_us: int, read_bytes: int, busy_us: int) -> int:
        """Bytes that may be read now for the next layer; 0 while that does not pay.

        Call once for each layer with the residency's counters: time without a demanded read, bytes
        read, and time in which the device was reading.
        """
        idle_before, read_before, busy_before = self._before
        self._before = (idle_us, read_bytes, busy_us)
        idle, read, busy = idle_us - idle_before, read_bytes - read_before, busy_us - busy_before
        self._idle_us += (min(idle, LONGEST_IDLE_US) - self._idle_us) / MEMORY
        if busy > 0:
            weight = MEMORY if self._bytes_per_us else 1
            self._bytes_per_us += (read / busy - self._bytes_per_us) / weight
        if self._layers_left > 0:
            self._layers_left -= 1
            return 0
        in_vain = 1 - min(self.precision, MOST_PRECISION)
        return max(0, int(self._idle_us * self._bytes_per_us / in_vain))

    def learn(self, foreseen: int, used: int) -> None:
        """Of `foreseen` bundles that were not in memory a layer did use `used`."""
        if not foreseen:
            return
        self.precision += (used / foreseen - self.precision) / MEMORY
        if self.precision < LEAST_PRECISION:
            self._layers_left = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self.precision = FIRST_PRECISION
