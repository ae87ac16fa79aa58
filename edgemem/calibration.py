"""Training predictors: what `edgemem calibrate` does unless it is given a cost (thresholds.py).

A store whose FFNs are taken apart runs a text, exactly, while what its FFNs read is recorded. From
the first half of the text predictors are made (predictors/low_rank.py); they are judged on the
second. The store is written anew with them, and runs the second half once more, predicting, so that
it can say what that costs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from .arguments import context_limit
from .budget import Budget, current_bytes
from .converters import calibrated
from .engine import Engine, load
from .errors import UnsupportedError
from .format import Kind
from .kernels.reference import activate, unpack
from .perplexity import encode_start, perplexity
from .predictors import low_rank, placement
from .sequence import TokenSequence
from .recording import Recording, recording
from .session import check_ids
from .store import Store
from .writer import check_target

RECALL = 0.98
"""Of the activations' sum; what is missing costs about as much perplexity (bench/LOG.md)."""
TOKENS = 12288
JUDGED = 3
"""One token in so many of the second half judges."""
WINDOW = 256
LEAST_TOKENS = 64
_PIECE_ROWS = 1024

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerReport:
    """One layer's predictor, and how good it is (low_rank.Quality) on text that it has not seen."""

    layer: int
    rank: int
    quality: low_rank.Quality


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did. `quality` is the mean of the layers', `ranks_tried` for each layer
    (rank, share of neurons that it would have to predict for that recall alone)."""

    target: str
    store_bytes: int
    tokens: int
    judged_tokens: int
    recall_wanted: float
    quality: low_rank.Quality
    layers: list[LayerReport]
    ranks_tried: list[list[tuple[int, float]]]
    exact_perplexity: float
    predicted_perplexity: float
    seconds: float

    @property
    def told(self) -> dict[str, float]:
        """What the store says of its predictors."""
        perplexities = {
            "perplexity": self.exact_perplexity, "predicted_perplexity": self.predicted_perplexity
        }  # fmt: skip
        return asdict(self.quality) | perplexities

    @property
    def cost(self) -> float:
        """By which share perplexity rises."""
        return self.predicted_perplexity / self.exact_perplexity - 1


def calibrate(
    store: str | os.PathLike, text: str | Sequence[int], target: str | os.PathLike | None = None,
    *, recall: float = RECALL, limit: int = TOKENS, memory: str | int = "auto",
    threads: int | None = None, force: bool = False, progress: Progress | None = None,
) -> CalibrationReport:  # fmt: skip
    """Give a store predictors that recall so much of its activations; `text` or token ids.

    Writes `target`, or replaces the store where there is none. Of the text the first `limit` tokens
    are used: their first half trains, a third of the second judges. Exact runs of the new store
    give what the old one gave. `memory` is the budget of the runs; training takes about 26 bytes
    for each token and neuron of a layer beside, and 4 bytes of disk for each token and number
    that layers read. `progress(doing, done, total)`.

    Raises ValueError for arguments and a text that is too short, UnsupportedError for a store whose
    FFNs are not taken apart or have no ReLU, StoreError and BudgetError, before any work; and what
    running raises.
    """
    started, path = time.perf_counter(), Path(store)
    out, force = path.resolve() if target is None else Path(target), force or target is None
    if not 0 < recall < 1:
        raise ValueError(f"recall must be between 0 and 1, not {recall}")
    check_limit(limit)
    with Store.open(path) as source:
        check_apart(source)
        _check_rests(source)
        check_target(out, force)
        window = min(WINDOW, context_limit(source.spec))
        budget, before = Budget(memory).limit, current_bytes()
        with load(path, budget, window, threads) as engine:
            seen, unseen = halves(engine, text, limit)
            unseen = unseen[: max(len(unseen) // JUDGED, LEAST_TOKENS // 2)]
            recorded = _record(engine, [*seen, *unseen], out.parent, progress)
            told = telling(progress, "measuring")
            exact = perplexity(engine, unseen, window, None, told).perplexity
        fits, orders = _fits(source, recorded, len(seen), recall, progress)
        predictors, reports = _judged(source, recorded, len(seen), fits, recall, progress)
        del recorded
        quality = _mean([report.quality for report in reports])
        said = asdict(quality) | {"perplexity": exact}

        def run_it(written: Path) -> dict:
            left = max(0, current_bytes() - before)  # by training
            with load(written, budget + left, window, threads, predict=True) as engine:
                found = perplexity(engine, unseen, window, None, told)
                said["predicted_perplexity"] = found.perplexity
            return said

        writing = telling(progress, "writing")
        size = calibrated.write(source, out, predictors, orders, run_it, force, writing)
    return CalibrationReport(
        target=str(out), store_bytes=size, tokens=len(seen), judged_tokens=len(unseen),
        recall_wanted=recall, quality=quality, layers=reports,
        ranks_tried=[fit.curve for fit in fits.values()], exact_perplexity=exact,
        predicted_perplexity=said["predicted_perplexity"],
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def check_limit(limit: int) -> None:
    """Raises ValueError for fewer tokens than calibrating needs."""
    if limit < LEAST_TOKENS:
        raise ValueError(f"limit must be at least {LEAST_TOKENS} tokens, not {limit}")


def check_apart(store: Store) -> None:
    """Raises UnsupportedError for a store whose FFNs are not taken apart."""
    if not store.spec.neurons:
        raise UnsupportedError(
            f"calibrating {store.path}: its feed-forward networks are not taken apart; convert the "
            "checkpoint with --neurons first"
        )


def _check_rests(store: Store) -> None:
    if not store.spec.rests:
        raise UnsupportedError(
            f"training predictors for {store.path}: they foretell which neurons ReLU lets rest, "
            f"and {store.spec.activation} lets none; calibrate thresholds instead (--cost 0.01)"
        )


def halves(engine: Engine, text: str | Sequence[int], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The halves of a text's first `limit` ids: to learn from, and to judge by, int32. Raises
    ValueError for a text that is too short."""
    if isinstance(text, str):
        text = encode_start(engine, text, limit)
    ids = check_ids(text, engine.spec.vocab_size)[:limit]
    if len(ids) < LEAST_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens; calibrating needs {LEAST_TOKENS}")
    half = len(ids) // 2
    return ids[:half], ids[half:]


def _record(
    engine: Engine, ids: Sequence[int], folder: Path, progress: Progress | None
) -> Recording:
    """What each layer's FFN reads of each token (see `recording`)."""
    told = telling(progress, "recording")
    with recording(engine, len(ids), folder) as recorded:
        for start in range(0, len(ids), engine.context):
            part = ids[start : start + engine.context]
            sequence = TokenSequence(engine)
            sequence.extend(np.array(part, np.int32))
            sequence.close()
            told(start + len(part), len(ids))
    return recorded


def _fits(
    store: Store, recorded: Recording, seen: int, recall: float, progress: Progress | None
) -> tuple[dict[int, low_rank.Fit], list[np.ndarray | None]]:
    """By layer: predictors in the making, and where neurons lie."""
    told, fits, layers = telling(progress, "training"), {}, dense_layers(store)
    orders: list[np.ndarray | None] = [None] * store.spec.n_layers
    for done, layer in enumerate(layers, 1):
        weights = Deciding(store, layer, with_up=True)
        of = weights.layer(recorded.inputs(layer, 0, seen))
        fits[layer] = low_rank.Fit(of, weights.deciding, 2 + store.spec.gated, recall)
        orders[layer] = placement.order(of.activations > 0)
        told(done, len(layers))
    return fits, orders


def _judged(
    store: Store, recorded: Recording, seen: int, fits: dict[int, low_rank.Fit], recall: float,
    progress: Progress | None,
) -> tuple[list[low_rank.Predictor | None], list[LayerReport]]:  # fmt: skip
    """Predictors by layer, as a store gives them back, and what the unseen text says of them."""
    told, threshold = telling(progress, "judging"), low_rank.threshold(fits.values(), recall)
    predictors: list[low_rank.Predictor | None] = [None] * store.spec.n_layers
    reports = []
    for layer, fit in fits.items():
        predictors[layer] = made = calibrated.stored(fit.predictor(threshold))
        of = Deciding(store, layer, with_up=True).layer(recorded.inputs(layer, seen))
        quality = low_rank.judge(made, of)
        reports.append(LayerReport(layer, made.rank, quality))
        told(len(reports), len(fits))
    return predictors, reports


def dense_layers(store: Store) -> list[int]:
    """Those whose FFNs are taken apart."""
    return [layer for layer, routed in enumerate(store.spec.routed) if not routed]


class Deciding:
    """The weights that decide in one layer and, `with_up`, what is multiplied with it."""

    def __init__(self, store: Store, layer: int, with_up: bool = False):
        self._spec = store.spec
        ffn, apart = (int(store.find(kind, layer)[0]) for kind in (Kind.FFN, Kind.NEURONS))
        self.deciding = _matrix(store, ffn, store.layout_of(ffn).segments[0].name)
        biases = [_vector(store, ffn, f"{name}_bias") for name in ("gate", "up")]
        self._bias, self._up_bias = biases if store.spec.gated else biases[::-1]
        hidden = store.spec.hidden
        self._up = None
        if store.spec.gated and with_up:
            self._up = _matrix(store, apart, "neurons", slice(-2 * hidden, -hidden))
            places = store.places(apart)
            self._up = self._up if places is None else self._up[places]

    def layer(self, inputs: np.ndarray) -> low_rank.Layer:
        """What they make of inputs [n, hidden]."""
        products = inputs @ self.deciding.T + self._bias
        active = activate(self._spec.activation, products)
        if self._up is not None:
            active *= inputs @ self._up.T + self._up_bias
        return low_rank.Layer(np.asarray(inputs), products, np.abs(active, out=active))

    def magnitudes(self, inputs: np.ndarray) -> np.ndarray:
        """Of each neuron behind the activation, float32 [n, width]."""
        products = inputs @ self.deciding.T + self._bias
        return np.abs(activate(self._spec.activation, products)).astype(np.float32)


def _matrix(store: Store, bundle: int, name: str, cols: slice = slice(None)) -> np.ndarray:
    """float32 [rows, cols], a piece at a time, as the numbers in between are larger."""
    segment = store.layout_of(bundle)[name]
    data, size = store.read_segment(bundle, segment), _PIECE_ROWS // segment.lanes
    group = len(data) // -(-segment.rows // segment.lanes)
    pieces = []
    for first in range(0, segment.rows, _PIECE_ROWS):
        start, rows = first // segment.lanes * group, min(_PIECE_ROWS, segment.rows - first)
        part = data[start : start + size * group]
        values = unpack(part, segment.dtype, rows, segment.cols, segment.lanes)
        pieces.append(values[:, cols].astype(np.float32))
    return np.concatenate(pieces)


def _vector(store: Store, bundle: int, name: str) -> np.ndarray | np.float32:
    layout = store.layout_of(bundle)
    if name not in layout:
        return np.float32(0)
    return np.frombuffer(store.read_segment(bundle, layout[name]), np.float32)[: layout[name].cols]


def _mean(found: Sequence[low_rank.Quality]) -> low_rank.Quality:
    names = [field.name for field in fields(low_rank.Quality)]
    return low_rank.Quality(
        **{name: float(np.mean([getattr(q, name) for q in found])) for name in names}
    )


def telling(progress: Progress | None, doing: str) -> Callable[[int, int], None]:
    """A callback(done, total) for one thing that is done."""
    return lambda done, total: progress(doing, done, total) if progress else None
