"""Which neurons of an FFN will be active, told by a product of two thin matrices.

The predictor of LLM in a flash (arXiv 2312.11514, section 3.1) scores neurons by score(reduce(x)).
There, gradient descent finds both from a balanced loss. Here both follow from the weights W that
decide and from their products with recorded inputs: the best approximation of those products at
some rank is their projection on their principal directions V, and V Vᵀ (W x + b) is V (Vᵀ W) x plus
a constant. What it leaves of each neuron's product is taken for normal noise, so that the share of
a layer's activation that a neuron is expected to have follows from its score; it is predicted where
that is above a threshold, one for all layers, which becomes a bias of the scores. That recalls more
than the balanced loss at the same number of neurons (bench/LOG.md), and takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RANKS = (32, 64, 128, 256, 512)
"""Those that are tried."""
HELD_BACK = 5
"""One token in so many serves to choose ranks and the threshold, and nothing else."""
ROW_COST = 8.0
"""What a byte of a predicted neuron costs beside a byte of the predictor, which stays in memory:
now and then it is read from flash."""

_POWER_STEPS = 3
_NEVER = -1e30
_LOWEST, _BIN, _N_BINS = -24.0, 1 / 128, 4097
"""Of the natural logarithm of expected shares: bin i is of those up to _LOWEST + i · _BIN."""


@dataclass(frozen=True)
class Layer:
    """One layer's recorded tokens. `inputs` [n, hidden] are what its FFN read, `products`
    [n, width] what decides made of them, its bias included, and `activations` [n, width] what down
    was multiplied by, as magnitudes; all float32."""

    inputs: np.ndarray
    products: np.ndarray
    activations: np.ndarray

    def part(self, rows: slice | np.ndarray) -> Layer:
        """Some of the tokens."""
        return Layer(self.inputs[rows], self.products[rows], self.activations[rows])


@dataclass(frozen=True)
class Predictor:
    """Neuron i may be active where (score @ reduce @ x)[i] + bias[i] > 0: float32
    [rank, hidden], [width, rank], [width]."""

    reduce: np.ndarray
    score: np.ndarray
    bias: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.reduce)

    def predicts(self, inputs: np.ndarray) -> np.ndarray:
        """bool [n, width]."""
        return (inputs @ self.reduce.T) @ self.score.T + self.bias > 0


@dataclass(frozen=True)
class Quality:
    """How good one is on some tokens. Shares of neurons that are `active` and `predicted`; of the
    activations' sum `recall` belongs to predicted ones; of the active neurons `found` are
    predicted; of those predicted `precision` are active."""

    active: float
    predicted: float
    recall: float
    found: float
    precision: float


class Fit:
    """A predictor in the making, of the best rank for a `recall` of this layer alone.

    `weights` float32 [width, hidden] decide. `row_parts`: how many rows of `hidden` weights a
    predicted neuron takes. `curve` has what was tried: (rank, share of neurons predicted at that
    recall).
    """

    def __init__(self, layer: Layer, weights: np.ndarray, row_parts: int, recall: float):
        held = np.arange(len(layer.inputs)) % HELD_BACK == HELD_BACK - 1
        seen, judge = layer.part(~held), layer.part(held)
        self._mean = seen.products.mean(axis=0)
        directions = _principal(seen.products - self._mean, _ranks(weights.shape, len(seen.inputs)))
        self._worth = _worth(seen)
        self._level = float(seen.activations.mean()) or 1.0
        width, hidden = weights.shape
        self.curve: list[tuple[int, float]] = []
        best = math.inf
        for rank in _ranks(weights.shape, len(seen.inputs)):
            tried = self._at(directions[:, :rank].copy(), seen, weights)
            counts, mass = _histogram(self._expected(tried, judge.inputs), judge.activations)
            share = _share_at(counts, mass, recall)
            self.curve.append((rank, share))
            cost = rank * (hidden + width) + ROW_COST * share * width * row_parts * hidden
            if cost < best:
                best, self._tried, self.histogram = cost, tried, (counts, mass)

    def _at(self, directions: np.ndarray, seen: Layer, weights: np.ndarray):
        reduce = directions.T @ weights
        scores = (seen.inputs @ reduce.T) @ directions.T
        offset = self._mean - scores.mean(axis=0)
        noise = (seen.products - scores - offset).std(axis=0) + 1e-6 * self._mean.std() + 1e-12
        return reduce, directions, offset, noise

    def _expected(self, tried, inputs: np.ndarray) -> np.ndarray:
        """What share of a mean neuron's activation each is expected to have, float32 [n, width]."""
        reduce, directions, offset, noise = tried
        z = ((inputs @ reduce.T) @ directions.T + offset) / noise
        return _positive_part(z) * (noise * self._worth / self._level)

    def predictor(self, threshold: float) -> Predictor:
        """With neurons of which more than `threshold` is expected."""
        reduce, directions, offset, noise = self._tried
        with np.errstate(divide="ignore"):
            least = _positive_part_inverse(threshold * self._level / (noise * self._worth))
        bias = np.where(self._worth > 0, offset - noise * least, _NEVER)
        return Predictor(*(np.ascontiguousarray(a, np.float32) for a in (reduce, directions, bias)))


def threshold(fits: Sequence[Fit], recall: float) -> float:
    """The one for all layers with which that share of their activations, each layer's counted
    alike, is predicted."""
    counts = sum(fit.histogram[0] / max(fit.histogram[0].sum(), 1) for fit in fits)
    mass = sum(fit.histogram[1] / max(fit.histogram[1].sum(), 1e-30) for fit in fits)
    return math.exp(_LOWEST + _BIN * _bin_at(counts, mass, recall))


def judge(predictor: Predictor, layer: Layer) -> Quality:
    """How good it is on these tokens."""
    predicted, active = predictor.predicts(layer.inputs), layer.activations > 0
    both, mass = predicted & active, float(layer.activations.sum(dtype=np.float64))
    caught = float(layer.activations[both].sum(dtype=np.float64))
    return Quality(
        active=float(active.mean()), predicted=float(predicted.mean()),
        recall=caught / mass if mass else 1.0,
        found=float(both.sum() / max(active.sum(), 1)),
        precision=float(both.sum() / max(predicted.sum(), 1)),
    )  # fmt: skip


def _ranks(shape: tuple[int, int], tokens: int) -> list[int]:
    """Those to try: what so many tokens can tell apart, and half of the hidden size at most."""
    most = max(1, min(shape[1] // 2, tokens // 2, shape[0]))
    return [rank for rank in RANKS if rank <= most] or [min(most, RANKS[0])]


def _principal(products: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """The first principal directions, float32 [width, rank], by subspace iteration."""
    tokens, width = products.shape
    rank = min(max(ranks) + 8, width)
    found = np.random.default_rng(0).standard_normal((width, rank), np.float32)
    for _ in range(_POWER_STEPS):
        found = np.linalg.qr(products.T @ (products @ found))[0]
    within = products @ found
    turned = np.linalg.eigh(within.T @ within)[1][:, ::-1]
    return (found @ turned)[:, : max(ranks)]


def _worth(seen: Layer) -> np.ndarray:
    """float32 [width]: activation for each unit of a positive product. Neurons that were hardly
    active are taken for average ones; those that never were have none."""
    positive = np.maximum(seen.products, 0).sum(axis=0, dtype=np.float64)
    sums = seen.activations.sum(axis=0, dtype=np.float64)
    average, prior = sums.sum() / max(positive.sum(), 1e-30), 0.05 * positive.mean()
    worth = (sums + prior * average) / np.maximum(positive + prior, 1e-30)
    return np.where(positive > 0, worth, 0.0).astype(np.float32)


def _histogram(expected: np.ndarray, activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neurons, and their activations, by what was expected of them, the lowest first."""
    logarithms = np.log(np.maximum(expected, 1e-30)).ravel()
    bins = np.clip(np.ceil((logarithms - _LOWEST) / _BIN), 0, _N_BINS - 1).astype(np.intp)
    counts = np.bincount(bins, minlength=_N_BINS).astype(np.float64)
    return counts, np.bincount(bins, activations.ravel(), minlength=_N_BINS)


def _bin_at(counts: np.ndarray, mass: np.ndarray, recall: float) -> int:
    """The last bin such that all above it have that share of the mass."""
    above = np.cumsum(mass[::-1])[::-1] / max(mass.sum(), 1e-30)
    enough = np.flatnonzero(above >= recall)
    return max(0, int(enough[-1]) - 1) if len(enough) else 0


def _share_at(counts: np.ndarray, mass: np.ndarray, recall: float) -> float:
    return float(counts[_bin_at(counts, mass, recall) + 1 :].sum() / counts.sum())


_FARTHEST, _PER_UNIT = 12, 256
_Z = np.linspace(-_FARTHEST, _FARTHEST, 2 * _FARTHEST * _PER_UNIT + 1)


def _table() -> np.ndarray:
    """Of ψ(z) = E max(0, z + e), e normal: z Φ(z) + φ(z)."""
    cumulative = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in _Z])
    return np.maximum(_Z * cumulative + np.exp(-(_Z**2) / 2) / math.sqrt(2 * math.pi), 1e-36)


_PSI = np.maximum.accumulate(_table()).astype(np.float32)


def _positive_part(z: np.ndarray) -> np.ndarray:
    at = np.clip(z * _PER_UNIT + (_FARTHEST * _PER_UNIT + 0.5), 0, len(_PSI) - 1)
    return np.maximum(_PSI[at.astype(np.int16)], z)  # beyond the table they are the same


def _positive_part_inverse(value: np.ndarray) -> np.ndarray:
    inside = np.interp(np.log(np.maximum(value, 1e-36)), np.log(_PSI.astype(np.float64)), _Z)
    return np.where(value > _FARTHEST, value, inside)
