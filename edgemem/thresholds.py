"""Choosing thresholds: what `edgemem calibrate --cost` does.

With SiLU and its like no neuron rests, but many add little. In a sparse run those rest whose
magnitude behind the activation is at most their layer's threshold (CATS, arXiv 2404.08763). One
number makes all thresholds: the share of its activation that each layer may lose. The largest one
is kept that raises perplexity by no more than was asked, of those in `SHARES`: on the first half of
a text, and then on the second, which learns of it last.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .arguments import context_limit
from .calibration import (
    TOKENS,
    WINDOW,
    Deciding,
    Progress,
    check_apart,
    check_limit,
    dense_layers,
    halves,
    telling,
)
from .converters import calibrated
from .engine import Engine, load
from .errors import UnsupportedError
from .perplexity import perplexity
from .recording import Recording, recording
from .store import Store
from .writer import check_target

COST = 0.01
"""So much more perplexity."""
SHARES = tuple(0.5 * 2 ** (-k / 4) for k in range(31, -1, -1))
"""Of a layer's activation, those that are tried."""
_SAMPLED = 512
"""Tokens that thresholds are made from, at the most."""


@dataclass(frozen=True)
class Sparsity:
    """What thresholds bring and cost, on the text that judged them.

    Of the neurons a token uses `used`, and without thresholds `active`; of the weights of FFNs
    `weights`, and `active_weights`. `lost` is the share of each layer's activation.
    """

    lost: float
    used: float
    active: float
    weights: float
    active_weights: float
    perplexity: float
    sparse_perplexity: float

    @property
    def cost(self) -> float:
        """By which share perplexity rises."""
        return self.sparse_perplexity / self.perplexity - 1


@dataclass(frozen=True)
class LayerThreshold:
    """One layer's, and the share of its neurons that a token uses, and uses without."""

    layer: int
    threshold: float
    used: float
    active: float


@dataclass(frozen=True)
class ThresholdReport:
    """What was chosen. `tried` has (share of activation lost, rise of perplexity on the text's
    first half) in the order in which they were tried."""

    target: str
    store_bytes: int
    tokens: int
    judged_tokens: int
    cost_wanted: float
    sparsity: Sparsity
    layers: list[LayerThreshold]
    tried: list[tuple[float, float]]
    seconds: float

    @property
    def cost(self) -> float:
        """By which share perplexity rises."""
        return self.sparsity.cost


def choose_thresholds(
    store: str | os.PathLike, text: str | Sequence[int], target: str | os.PathLike | None = None,
    *, cost: float = COST, limit: int = TOKENS, memory: str | int = "auto",
    threads: int | None = None, force: bool = False, progress: Progress | None = None,
) -> ThresholdReport:  # fmt: skip
    """Give a store thresholds that raise perplexity by no more than the share `cost`.

    `text` or token ids, of which `limit` are used, half of them to judge by: they run about ten
    times. Writes `target`, or replaces the store where there is none. Exact runs of the new store
    give what the old one gave. `memory` is the budget of the runs; thresholds take the matrix that
    decides and about 16 KiB for each neuron of a layer beside. `progress(doing, done, total)`.

    Raises ValueError for arguments and a text that is too short, UnsupportedError for a store whose
    FFNs are not taken apart, StoreError and BudgetError, before any work; UnsupportedError where
    not even the least share costs as little; and what running raises.
    """
    started, path = time.perf_counter(), Path(store)
    out, force = path.resolve() if target is None else Path(target), force or target is None
    if not 0 < cost < math.inf:
        raise ValueError(f"cost must be above 0 and finite, not {cost}")
    check_limit(limit)
    with Store.open(path) as source:
        check_apart(source)
        check_target(out, force)
        window = min(WINDOW, context_limit(source.spec))
        with load(path, memory, window, threads) as engine:
            search = _Search(engine, source, text, limit, out.parent, progress)
            chosen = search.choose(cost)
            if chosen is None:
                raise UnsupportedError(
                    f"choosing thresholds for {path}: to lose {100 * SHARES[0]:.2g} % of the "
                    f"activation costs over {100 * cost:g} % of perplexity; allow more (--cost)"
                )
            sparsity, layers = search.report(chosen)
        told, thresholds = telling(progress, "writing"), search.thresholds[chosen.index].tolist()
        size = calibrated.write_thresholds(source, out, thresholds, asdict(sparsity), force, told)
    return ThresholdReport(
        target=str(out), store_bytes=size, tokens=len(search.seen),
        judged_tokens=len(search.unseen), cost_wanted=cost, sparsity=sparsity, layers=layers,
        tried=search.tried, seconds=time.perf_counter() - started,
    )  # fmt: skip


@dataclass(frozen=True)
class _Chosen:
    """Thresholds of SHARES[index], and of the text's second half the perplexity, exactly and with
    them, and what layers read with them."""

    index: int
    exact: float
    sparse: float
    inputs: Recording


class _Search:
    """Thresholds [shares, layers], and what running with them costs."""

    def __init__(
        self, engine: Engine, store: Store, text: str | Sequence[int], limit: int, folder: Path,
        progress: Progress | None,
    ):  # fmt: skip
        self._engine, self._store, self._folder, self._progress = engine, store, folder, progress
        self.seen, self.unseen = halves(engine, text, limit)
        self.tried: list[tuple[float, float]] = []
        with self._recording(self.seen) as inputs:
            self._exact = self._run(self.seen, "recording")
        self.thresholds, self._active = self._made(inputs)

    def _run(self, ids: np.ndarray, doing: str, index: int | None = None) -> float:
        """Perplexity with the thresholds of SHARES[index], or exactly."""
        told, none = telling(self._progress, doing), [0.0] * self._store.spec.n_layers
        self._engine.rest(none if index is None else self.thresholds[index])
        return perplexity(self._engine, ids, self._engine.context, progress=told).perplexity

    def _recording(self, ids: np.ndarray):
        # An odd step, as else the first token of a window, which is unlike others, came too often.
        return recording(self._engine, len(ids), self._folder, -(-len(ids) // _SAMPLED) | 1)

    def _made(self, inputs: Recording) -> tuple[np.ndarray, dict[int, float]]:
        """Thresholds that lose each of SHARES, and by layer the share of neurons that are active
        without, of what layers read."""
        made, active = np.zeros((len(SHARES), inputs.layers)), {}
        told, layers = telling(self._progress, "sorting"), dense_layers(self._store)
        for done, layer in enumerate(layers, 1):
            found = np.sort(self._magnitudes(layer, inputs), axis=None)
            lost = np.cumsum(found, dtype=np.float64)
            most = np.searchsorted(lost, np.array(SHARES) * lost[-1], side="right") - 1
            made[:, layer] = np.where(most < 0, 0, found[most])
            active[layer] = float((found > 0).mean())
            told(done, len(layers))
        return made, active

    def _magnitudes(self, layer: int, inputs: Recording) -> np.ndarray:
        """float32 [tokens, width]."""
        return Deciding(self._store, layer).magnitudes(inputs.inputs(layer))

    def choose(self, cost: float) -> _Chosen | None:
        """The largest of SHARES that costs no more on the first half of the text, or that of the
        next smaller ones that does not on the second; None where none does."""
        largest, exact = self._largest(cost), self._run(self.unseen, "judging")
        for index in range(largest, -1, -1):
            with self._recording(self.unseen) as inputs:
                sparse = self._run(self.unseen, "judging", index)
            if sparse / exact - 1 <= cost:
                return _Chosen(index, exact, sparse, inputs)
        return None

    def _largest(self, cost: float) -> int:
        """Which of SHARES is the largest that costs no more on the first half; -1: none."""
        fits, fails = -1, len(SHARES)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            rise = self._run(self.seen, "trying", middle) / self._exact - 1
            self.tried.append((SHARES[middle], rise))
            fits, fails = (middle, fails) if rise <= cost else (fits, middle)
        return fits

    def report(self, chosen: _Chosen) -> tuple[Sparsity, list[LayerThreshold]]:
        """What was chosen brings and costs."""
        layers = []
        for layer, active in self._active.items():
            threshold = float(self.thresholds[chosen.index, layer])
            used = float((self._magnitudes(layer, chosen.inputs) > threshold).mean())
            layers.append(LayerThreshold(layer, threshold, used, active))
        used, active = (float(np.mean([getattr(x, n) for x in layers])) for n in ("used", "active"))
        others = 1 + self._store.spec.gated  # beside what decides, which every token multiplies
        weights, active_weights = ((1 + others * x) / (1 + others) for x in (used, active))
        return Sparsity(
            SHARES[chosen.index], used, active, weights, active_weights, chosen.exact, chosen.sparse
        ), layers
