"""What a store holds, counted from its directory: parameters, and bytes by kind and format."""

from __future__ import annotations

import numpy as np

from .dtypes import BY_NAME, LANES, MULTIPLIED, Q4_0, U32, DType, matrix_bytes
from .format import STREAMABLE, Kind, Segment
from .planner import Bundles
from .rows import overhead_bytes
from .store import Store

NEURON_USE = 0.1
"""The share of neurons that a few tokens in a row are expected to want (bench/LOG.md), where some
rest of themselves."""


def parameter_count(store: Store) -> int:
    """Weights of the model, padding left out; tied tables count once, as does what decides where
    neurons have it too. Predictors are none."""
    extra = store.spec.hidden * bool(store.spec.ranks)
    per_layout = [
        sum(
            s.rows * (s.cols - extra * (s.name == "neurons"))
            for s in layout.segments
            if s.dtype is not U32 and "reduce" not in layout
        )
        for layout in store.layouts
    ]
    return int(_layout_uses(store) @ np.array(per_layout, np.int64))


def resident_bytes(store: Store) -> int:
    """Bytes of all bundles as they lie in memory: whole pages."""
    return int(store.entries["page_count"].sum(dtype=np.int64)) * store.page_size


def by_kind(store: Store) -> dict[str, dict[str, int]]:
    """For each kind that occurs: bundle_count and payload_bytes."""
    kinds, payload = store.entries["kind"], store.entries["payload_bytes"]
    return {
        kind.name.lower(): {
            "bundle_count": int((kinds == kind).sum()),
            "payload_bytes": int(payload[kinds == kind].sum(dtype=np.int64)),
        }
        for kind in Kind
        if (kinds == kind).any()
    }


def by_dtype(store: Store) -> dict[str, int]:
    """Bytes of the segments of each number format."""
    sizes = dict.fromkeys((*BY_NAME, U32.name), 0)
    for layout, uses in zip(store.layouts, _layout_uses(store).tolist()):
        for segment in layout.segments:
            sizes[segment.dtype.name] += segment.bytes * uses
    return {name: size for name, size in sizes.items() if size}


def bytes_as(store: Store, dtype: DType) -> int:
    """About how many bytes the bundles would have, had the store been converted to `dtype`, which
    it then is without predictors."""
    extra = store.spec.hidden * bool(store.spec.ranks)
    per_layout = [
        sum(_bytes_as(s, dtype, extra) for s in layout.segments if "reduce" not in layout)
        for layout in store.layouts
    ]
    return int(_layout_uses(store) @ np.array(per_layout, np.int64))


def multiply_adds(store: Store, use: np.ndarray) -> dict[str, float]:
    """Of one token by number format (dtypes.MULTIPLIED), where `use` float64 [n_bundles] says how
    much of each bundle it takes."""
    per_layout = np.bincount(store.entries["layout"], use, len(store.layouts))
    counts = {dtype.name: 0.0 for dtype in MULTIPLIED}
    for layout, uses in zip(store.layouts, per_layout.tolist()):
        for segment in layout.segments:
            if segment.dtype is not U32:
                dtype = segment.dtype if segment.dtype in MULTIPLIED else Q4_0
                counts[dtype.name] += segment.rows * segment.cols * uses
    return counts


def _layout_uses(store: Store) -> np.ndarray:
    """How many bundles are of each layout class, int64 [n_layouts]."""
    return np.bincount(store.entries["layout"], minlength=len(store.layouts)).astype(np.int64)


def _bytes_as(segment: Segment, dtype: DType, extra: int) -> int:
    """Segment bytes in the other format; vectors and routers keep theirs. `extra` columns of
    neurons are there for predictors."""
    if segment.rows == 1 or (segment.lanes != LANES and segment.name not in ("rows", "neurons")):
        return segment.bytes
    if segment.name in ("router", "shared_gate"):
        return segment.bytes
    if segment.name == "rows" and dtype.name == "q4_0":
        dtype = BY_NAME["q8_0"]
    cols = segment.cols - extra * (segment.name == "neurons")
    return matrix_bytes(dtype, segment.rows, cols, segment.lanes)


def left_out(store: Store, predict: bool) -> np.ndarray:
    """Bundles that a run has no use for, uint32: where it predicts which neurons are active, what
    decides it exactly, else the predictors."""
    kinds, spec = store.entries["kind"], store.spec
    unused = kinds == (Kind.FFN if predict else Kind.PREDICTOR)
    return np.flatnonzero(unused & bool(spec.ranks)).astype(np.uint32)


def plannable(store: Store, head: bool = False, predict: bool = False) -> Bundles:
    """The store's bundles as the planner sees them. `head`: the output head may stream too."""
    kinds, spec = store.entries["kind"], store.spec
    sizes = store.entries["page_count"].astype(np.int64) * store.page_size
    may_stream = np.isin(kinds, (*STREAMABLE, Kind.HEAD) if head else STREAMABLE)
    unused = left_out(store, predict)
    sizes[unused], may_stream[unused] = 0, False
    experts, embeds = kinds == Kind.EXPERT, kinds == Kind.EMBED
    use = np.ones(len(kinds))
    use[experts] = spec.top_k / max(spec.n_experts, 1)
    use[embeds] = 1 / max(int(embeds.sum()), 1)
    neurons = kinds == Kind.NEURONS
    use[neurons] = NEURON_USE if spec.rests else 1
    return Bundles(
        layouts=store.entries["layout"].astype(np.int64),
        sizes=sizes,
        may_stream=may_stream,
        at_once=np.where(experts, max(spec.top_k, 1), 1),
        use=use,
        rows=np.where(neurons, spec.intermediate, 0),
        aside_bytes=overhead_bytes(store),
    )


def turns(store: Store) -> np.ndarray:
    """int64 [n_bundles]: when in a step each bundle has its turn: 0 for the embedding, i + 1 for
    layer i, and after the layers the head. Policies call these layers."""
    kinds, layers = store.entries["kind"], store.entries["layer"].astype(np.int64) + 1
    layers[kinds == Kind.EMBED] = 0
    layers[kinds == Kind.HEAD] = store.spec.n_layers + 1
    return layers
