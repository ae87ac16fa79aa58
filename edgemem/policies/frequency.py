"""The least popular goes first: popularity counted on the way, or known from a profile."""

import numpy as np

from .policy import LARGEST_COUNT, Policy


class Lfu(Policy):
    """Ranks by the number of tokens that used a bundle since the start."""

    name = "lfu"

    def observe(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> None:
        self._ranks[ids] += 1 if uses is None else uses
        if len(ids) and self._ranks[ids].max() >= LARGEST_COUNT:
            self._ranks *= 0.5


class Static(Policy):
    """Ranks by a popularity that a profile measured, and keeps to it."""

    name = "static"

    def __init__(self, layer_of: np.ndarray, n_layers: int, popularity: np.ndarray):
        """`popularity`, [n]: how often each bundle is used, in any unit."""
        super().__init__(layer_of, n_layers)
        popularity = np.asarray(popularity, np.float32)
        if popularity.shape != self._ranks.shape:
            raise ValueError(
                f"the profile ranks {popularity.size} bundles, the model has {len(self._ranks)}"
            )
        self._ranks = popularity

    def observe(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> None:
        """Nothing that happens changes a profile."""
