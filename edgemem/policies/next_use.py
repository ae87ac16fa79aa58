"""What is expected to be used last goes first: the default, which a scan does not flush.

A bundle of a layer that lies d layers ahead, used by a share p of tokens, is next used after
d + n_layers · (1/p − 1) layers on average, if tokens choose independently. With p = 1 (a dense model
streamed in layer order) that is Belady's choice itself, where least recently used never hits.
"""

import numpy as np

from .policy import Policy

HALF_LIFE_TOKENS = 8.0
PRIOR = 0.01
"""Uses per token of a bundle that was never seen; it also bounds what one quiet spell can do."""


class NextUse(Policy):
    """Ranks by the expected time of the next use, from decaying rates of use.

    Ranks are restated for one layer at a time, when the model is there: a rank is minus the
    moment, on one clock that counts layers, at which the next use is expected.
    """

    name = "next-use"

    def __init__(
        self, layer_of: np.ndarray, n_layers: int,
        half_life: float = HALF_LIFE_TOKENS, prior: float = PRIOR,
    ):  # fmt: skip
        super().__init__(layer_of, n_layers)
        self._keep = 0.5 ** (1 / half_life)
        self._prior = np.float32(prior)
        self._rates = np.zeros(len(self.layer_of), np.float32)
        self._turn_start = 0
        self._last = -1
        self._ranks[:] = -(self.layer_of + n_layers * (1 / prior - 1))

    def observe(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> None:
        if layer <= self._last:
            self._turn_start += self.n_layers
            if self._turn_start >= 1 << 14:
                self._rebase()
        self._last = layer
        where = self._slice(layer)
        rates, ranks = self._rates[where], self._ranks[where]
        keep = self._keep**tokens
        rates *= np.float32(keep)
        gain = np.float32((1 - keep) / tokens)
        self._rates[ids] += gain if uses is None else gain * uses
        np.add(rates, self._prior, out=ranks)
        np.divide(np.float32(-self.n_layers), ranks, out=ranks)
        ranks -= np.float32(self._turn_start + layer)

    def _rebase(self) -> None:
        """Set the clock back, so that float32 keeps telling single layers apart."""
        self._ranks += np.float32(self._turn_start)
        self._turn_start = 0
