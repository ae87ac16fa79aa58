"""What is expected to be used last goes first: the default, which a scan does not flush.

A bundle of a layer that lies d layers ahead, taken by a share p of tokens, is next used after
d + n_layers · (1/p − 1) layers on average, if tokens choose independently. With p = 1 (a dense
model streamed in layer order) that is Belady's choice itself, where least recently used never hits.

Tokens are not quite independent: what was just used is likelier to come again than popularity says,
and some texts drift where others keep to their subject. So p is a mixture of several rates of use,
from one that forgets within tokens to one that is popularity, in shares that are learned on the
way: each use is credited to the rates that foresaw it (expectation maximisation, on line).
bench/LOG.md has what else was tried on real traces.
"""

import numpy as np

from .policy import Policy

HALF_LIVES = (0.7, 16.0, 128.0)
"""Of the rates, in tokens."""
SHARES = (0.2, 0.7, 0.1)
"""Of the rates in the mixture at first."""
LEARNING = 0.002
"""How far the shares move towards what one turn says."""
PRIOR = 0.05
"""Added to every p: what a bundle that was never seen is given."""
LEAST_RATE = 1e-4
"""Some credit for every rate, however little it expected."""

_REBASE = 1 << 14


class NextUse(Policy):
    """Ranks by the expected time of the next use.

    Ranks are restated for one layer at a time, when the model is there: a rank is minus the
    moment, on one clock that counts layers, at which the next use is expected.
    """

    name = "next-use"

    def __init__(self, layer_of: np.ndarray, n_layers: int):
        super().__init__(layer_of, n_layers)
        self._keep = 0.5 ** (1 / np.array(HALF_LIVES))
        self._one_token = self._factors(1)
        self._shares = np.array(SHARES, np.float32)
        self._rates = np.zeros((len(HALF_LIVES), len(self.layer_of)), np.float32)
        self._tokens = np.zeros(n_layers)
        self._turn_start = 0
        self._last = -1
        self._ranks[:] = -(self.layer_of + n_layers * (1 / PRIOR - 1))

    def observe(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> None:
        if layer <= self._last:
            self._turn_start += self.n_layers
            if self._turn_start >= _REBASE:
                self._rebase()
        self._last = layer
        keep, gain = self._one_token if tokens == 1 else self._factors(tokens)
        where = self._slice(layer)
        rates, ranks = self._rates[:, where], self._ranks[where]
        if self._tokens[layer] and len(ids):
            self._learn(layer, ids, uses)
        rates *= keep
        self._rates[:, ids] += gain if uses is None else gain * uses
        self._tokens[layer] += tokens
        np.matmul(self._shares / self._weight(layer), rates, out=ranks)
        ranks += np.float32(PRIOR)
        np.divide(np.float32(-self.n_layers), ranks, out=ranks)
        ranks -= np.float32(self._turn_start + layer)

    def _weight(self, layer: int) -> np.ndarray:
        """float32 [rates]: what each rate is that was fed with ones since the start, from 0."""
        return (1 - self._keep ** self._tokens[layer]).astype(np.float32)

    def _learn(self, layer: int, ids: np.ndarray, uses: np.ndarray | None) -> None:
        """Credit this turn's uses to the rates that expected them."""
        expected = self._rates[:, ids] / self._weight(layer)[:, None]
        expected += np.float32(LEAST_RATE)
        expected *= self._shares[:, None]
        expected /= expected.sum(0)
        count = np.float32(len(ids))
        if uses is not None:
            expected *= uses
            count = np.float32(uses.sum())
        self._shares += np.float32(LEARNING) * (expected.sum(1) / count - self._shares)

    def _factors(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """What is left of each rate after some tokens, and what one use among them adds."""
        keep = (self._keep**tokens)[:, None]
        return keep.astype(np.float32), ((1 - keep) / tokens).astype(np.float32)

    def _rebase(self) -> None:
        """Set the clock back, so that float32 keeps telling single layers apart."""
        self._ranks += np.float32(self._turn_start)
        self._turn_start = 0
