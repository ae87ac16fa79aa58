"""From logits to the next token.

The filters, their order and their meaning are those of transformers' logits processors: repetition
penalty, temperature, top-k, top-p, min-p. Where logits tie, greedy takes the lowest id, top-p keeps
the lowest ids, and top-k keeps every token that ties with the k-th. Equal seeds give equal tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import numpy as np

from .errors import UnsupportedError

_HEAD = 1024
"""Top-p looks at this many of the likeliest tokens first; they nearly always hold enough mass."""

_BLOCK = 512
"""Weights that are summed at once when one is drawn."""

_SMALLEST, _LARGEST = 1e-30, 1e30
"""No setting makes sense beyond these, and float32 ends soon after."""

_COLDEST = np.float32(1e-30)
"""Lower temperatures count as this: dividing by them would overflow float32."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults always take the likeliest.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 switch
    their filters off. `seed` None draws a fresh one each time. Raises TypeError or ValueError
    naming the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Sampling:
        """From keyword arguments; TypeError names those that do not exist, and those that do."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(
                f"generating: there is no option {unknown[0]!r}; those of sampling are "
                + ", ".join(known)
            )
        return cls(**options)

    def __post_init__(self):
        _check(
            "temperature", self.temperature, Real, lambda v: 0 <= v <= _LARGEST,
            f"from 0 to {_LARGEST:g}",
        )  # fmt: skip
        _check("top_k", self.top_k, Integral, lambda v: v >= 0, "zero (off) or more")
        _check("top_p", self.top_p, Real, lambda v: 0 <= v <= 1, "from 0 to 1")
        _check("min_p", self.min_p, Real, lambda v: 0 <= v <= 1, "from 0 to 1")
        _check(
            "repetition_penalty", self.repetition_penalty, Real,
            lambda v: _SMALLEST <= v <= _LARGEST, f"from {_SMALLEST:g} to {_LARGEST:g}",
        )  # fmt: skip
        if self.seed is not None:
            _check("seed", self.seed, Integral, lambda v: v >= 0, "zero or more")


def _check(name: str, value, kind: type, holds, wanted: str) -> None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
        noun = "an integer" if kind is Integral else "a number"
        raise TypeError(f"{name} must be {noun}, not {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {wanted}, not {value}")


class Sampler:
    """Chooses the tokens of one generation; holds its random stream."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        seed = None if sampling.seed is None else int(sampling.seed)
        # The stdlib's generator: its stream for a seed is promised never to change.
        self._random = random.Random(seed) if sampling.temperature > 0 else None

    def choose(self, logits: np.ndarray, history: Sequence[int] = ()) -> int:
        """The next token. `logits` float32 [vocab] is left alone; `history` is all ids so far."""
        if self.sampling.repetition_penalty != 1.0 and len(history):
            logits = _penalized(logits, history, self.sampling.repetition_penalty)
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):
            raise UnsupportedError(
                "sampling: the model's logits are not finite; its numbers overflow in this format, "
                "try another --dtype when converting"
            )
        if self._random is None:
            return likeliest
        ids, weights = candidates(logits, self.sampling)
        drawn = _place_of(weights, self._random.random())
        return drawn if ids is None else int(ids[drawn])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """What survives temperature and the filters: ids in rising order (None: all) and weights.

    Weights are probabilities up to a common factor: 1.0 is the likeliest token's.
    """
    scores = (logits - logits.max()) / max(np.float32(sampling.temperature), _COLDEST)
    ids = None
    if 0 < sampling.top_k < len(scores):
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scores >= kth)
        scores = scores[ids]
    weights = np.exp(scores)
    if sampling.top_p < 1.0:
        ids, weights = _narrow(ids, weights, _nucleus(weights, sampling.top_p))
    if sampling.min_p > 0.0:
        ids, weights = _narrow(ids, weights, np.flatnonzero(weights >= sampling.min_p))
    return ids, weights


def _narrow(ids, weights, keep):
    """Keep the candidates at the places `keep`, which rise."""
    return (keep if ids is None else ids[keep]), weights[keep]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the smallest set of likeliest candidates whose share reaches `top_p`; at least one.

    A candidate stays if those before it, likeliest first and lower id first, hold less than
    `top_p`.
    """
    wanted = top_p * weights.sum(dtype=np.float64)
    falling = np.empty(0, np.float32)
    if len(weights) > _HEAD:
        falling = np.sort(np.partition(weights, -_HEAD)[-_HEAD:])[::-1]
    if falling.sum(dtype=np.float64) < wanted or not len(falling):
        falling = np.sort(weights)[::-1]
    before = np.cumsum(falling, dtype=np.float64) - falling
    kept = max(1, int(np.count_nonzero(before < wanted)))
    lowest = falling[kept - 1]
    keep = weights > lowest
    ties = np.flatnonzero(weights == lowest)
    keep[ties[: kept - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def _place_of(weights: np.ndarray, share: float) -> int:
    """The place where the running total of the weights passes `share` (below 1) of their sum.

    Totals run over blocks first and then within one block: a running total is slow.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts, dtype=np.float64)
    bounds = np.cumsum(sums)
    # Rounding must not put the draw on the end itself, nor on a candidate without weight.
    target = min(share * bounds[-1], np.nextafter(bounds[-1], 0.0))
    block = int(np.searchsorted(bounds, target, side="right"))
    inside = weights[starts[block] : starts[block] + _BLOCK]
    target -= bounds[block] - sums[block]
    place = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target, side="right"))
    return int(starts[block]) + min(place, int(np.flatnonzero(inside)[-1]))


def _penalized(logits: np.ndarray, history: Sequence[int], penalty: float) -> np.ndarray:
    """A copy in which the tokens of `history` have positive logits divided, others multiplied."""
    seen = np.asarray(history, dtype=np.int64)
    logits = logits.copy()
    scores = logits[seen]
    # Repeated ids write the same value again, so they need not be made unique.
    logits[seen] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return logits
