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

from .._native import check, ffi, lib, pointer
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

_LONGEST_CLOCK = 1 << 14
"""In layers; then the clock is set back, so that float32 keeps telling single layers apart."""


class NextUse(Policy):
    """Ranks by the expected time of the next use.

    Ranks are restated for one layer at a time, when the model is there: a rank is minus the
    moment, on one clock that counts layers, at which the next use is expected. The arithmetic is
    native/next_use.c: a step has many layers, and one of 128 experts costs about 1 us.
    """

    name = "next-use"

    def __init__(self, layer_of: np.ndarray, n_layers: int):
        super().__init__(layer_of, n_layers)
        n_rates = len(HALF_LIVES)
        self._rates = np.zeros((n_rates, len(self.layer_of)), np.float32)
        self._ranks[:] = -(self.layer_of + n_layers * (1 / PRIOR - 1))
        self._arrays = {
            "starts": pointer(np.array(self._starts, np.int64), "int64_t *"),
            "keep": pointer(0.5 ** (1 / np.array(HALF_LIVES)), "double *"),
            "weights": pointer(np.zeros((n_layers, n_rates)), "double *"),
            "shares": pointer(np.array(SHARES, np.float64), "double *"),
            "rates": pointer(self._rates, "float *"),
            "ranks": pointer(self._ranks, "float *"),
        }
        self.native = ffi.new("em_next_use *", {
            **self._arrays, "n_layers": n_layers, "n_rates": n_rates, "last_layer": -1,
            "learning": LEARNING, "least_rate": LEAST_RATE, "prior": PRIOR,
            "longest_clock": _LONGEST_CLOCK,
        })  # fmt: skip

    def observe(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> None:
        assert uses is None or len(uses) == len(ids)
        status = lib.em_next_use_observe(
            self.native, layer, _integers(ids, np.uint32), len(ids),
            ffi.NULL if uses is None else _integers(uses, np.int32), tokens,
        )  # fmt: skip
        if status != lib.EM_OK:
            check(status, f"ranking the bundles of layer {layer}")


def _integers(numbers: np.ndarray, dtype: type):
    return pointer(np.ascontiguousarray(numbers, dtype), f"{np.dtype(dtype).name}_t *")
