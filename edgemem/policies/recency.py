"""Least recently used goes first."""

import numpy as np

from .policy import LARGEST_COUNT, Policy, renumber


class Lru(Policy):
    """Ranks by the time of the last use. Never hits where the cache is below one token cycle."""

    name = "lru"

    def __init__(self, layer_of: np.ndarray, n_layers: int):
        super().__init__(layer_of, n_layers)
        self._clock = 0

    def observe(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> None:
        self._clock += 1
        self._ranks[ids] = self._clock
        if self._clock >= LARGEST_COUNT:
            self._clock = renumber(self._ranks)
