"""What a cache policy is: it watches demand and ranks bundles; it never touches memory or files."""

from abc import ABC, abstractmethod

import numpy as np

from .._native import ffi


class Policy(ABC):
    """Ranks the streamed bundles of a model: where room is needed, the lowest rank goes first.

    Bundles are numbered from 0, layer by layer; `layer_of` (ascending, int [n]) gives the layer of
    each among the model's `n_layers`, some of which may hold none. For every layer of every step
    the streamer calls `observe`, reads `ranks`, and lets the residency evict. Bundles of equal rank
    go in the order of their numbers, so that a replay finds what a live run found.
    """

    name: str
    native = ffi.NULL
    """The em_next_use that observes turns in native code; without one `observe` is called back."""

    def __init__(self, layer_of: np.ndarray, n_layers: int):
        self.layer_of = np.asarray(layer_of, np.int64)
        self.n_layers = n_layers
        self._starts = np.searchsorted(self.layer_of, np.arange(n_layers + 1)).tolist()
        self._ranks = np.zeros(len(self.layer_of), np.float32)

    @abstractmethod
    def observe(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> None:
        """One step of `tokens` tokens demanded bundles `ids` of `layer`, each of them once.

        `uses` says how many of the tokens took each of them; without it, one each.
        """

    def ranks(self, layer: int) -> np.ndarray:
        """float32 [n]: all ranks as seen from `layer`; a view, good until the next `observe`."""
        return self._ranks


LARGEST_COUNT = float(1 << 23)
"""float32 counts exactly up to here, with room for one more step; then ranks are renumbered."""


def renumber(ranks: np.ndarray) -> int:
    """Replace ranks by small whole numbers in the same order, in place; returns the highest."""
    _, order = np.unique(ranks, return_inverse=True)
    ranks[:] = order
    return int(order.max(initial=0))
