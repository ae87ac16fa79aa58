"""How much to read ahead of demand: as much as the device has idle time for, and while it pays.

Between the last read that a layer waits for and the first that the next one asks for, the device
has nothing to do but to read what is likely wanted. What is read in vain must fit into that time,
or it would delay demand; what is wanted anyway is only read earlier.
"""

from __future__ import annotations

from ._native import ffi, lib

MEMORY = 64
"""Layers over which measurements are averaged."""
LONGEST_IDLE_US = 100_000
"""Idle time of one layer that counts: in a longer one nobody ran the model."""
FIRST_PRECISION, LEAST_PRECISION, MOST_PRECISION = 0.75, 0.5, 0.98
"""What is assumed at first; below, reading ahead stops; above, there is nothing more to win."""
FIRST_PACE = 0.0
"""Bytes per microsecond that the device is believed to read before it has shown any."""
FIRST_PAUSE = 16 * MEMORY
"""Layers without reading ahead once it does not pay; each pause is twice the one before."""
LONGEST_PAUSE = 1 << 20


class Lookahead:
    """Admits bytes to be read ahead, from what was measured in the layers before.

    The arithmetic is native/lookahead.c, which streams call in turns that foresee; `state` is what
    it works on. Of that, `precision` is the share of what was foreseen, and not in memory, that its
    layer did use.
    """

    def __init__(self):
        self.state = state = ffi.new("em_lookahead *")
        state.precision, state.first_precision = FIRST_PRECISION, FIRST_PRECISION
        state.least_precision, state.most_precision = LEAST_PRECISION, MOST_PRECISION
        state.bytes_per_us, state.memory = FIRST_PACE, MEMORY
        state.longest_idle_us = LONGEST_IDLE_US
        state.pause, state.longest_pause = FIRST_PAUSE, LONGEST_PAUSE

    def admit(self, idle_us: int, read_bytes: int, busy_us: int) -> int:
        """Bytes that may be read now for layers to come; 0 while that does not pay.

        Call once for each layer with the residency's counters: time without a demanded read, bytes
        read, and time in which the device was reading.
        """
        return lib.em_lookahead_admit(self.state, idle_us, read_bytes, busy_us)

    def learn(self, foreseen: int, used: int) -> None:
        """Of `foreseen` bundles that were not in memory a layer did use `used`."""
        lib.em_lookahead_learn(self.state, foreseen, used)
