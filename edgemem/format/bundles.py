"""Which bundles a model has, in which order, with which segments: all of it follows from the spec.

The converter lays out what this says, and opening a store holds its directory to it, so that
nothing after that has to ask whether a weight is there or how big it is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np

from ..dtypes import F32, GGUF_BLOCKS, LANES, U32, DType, matrix_bytes
from ..errors import CorruptError
from ..spec import ModelSpec
from .layout import NO_LAYER, Kind, Layout
from .meta import Meta

EMBED_BUNDLE_BYTES = 256 << 10
HEAD_BUNDLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Part:
    """One segment that a bundle has, or may have: its shape follows from the spec, and so does its
    number format where it has one of its own."""

    name: str
    rows: int
    cols: int
    lanes: int = LANES
    optional: bool = False
    dtype: DType | None = None


def bundle_parts(spec: ModelSpec, kind: Kind, layer: int) -> tuple[Part, ...]:
    """A layer bundle's segments in canonical order (for EMBED and HEAD see `table_rows`)."""
    hidden = spec.hidden
    if kind in (Kind.FFN, Kind.EXPERT, Kind.SHARED):
        width = {
            Kind.FFN: spec.intermediate,
            Kind.EXPERT: spec.expert_intermediate,
            Kind.SHARED: spec.shared_intermediate,
        }[kind]
        inner = ("gate", "up") if spec.gated else ("up",)
        apart = kind == Kind.FFN and spec.neurons  # then the first of them decides
        return (
            *(Part(name, width, hidden) for name in inner[: 1 if apart else 2]),
            *(_bias(f"{name}_bias", width) for name in inner),
            *(() if apart else (Part("down", hidden, width),)),
            _bias("down_bias", hidden),
        )
    if kind == Kind.NEURONS:
        return (
            Part("neurons", spec.intermediate, _neuron_cols(spec), lanes=1),
            Part("checksums", 1, spec.intermediate, lanes=1, dtype=U32),
            Part("places", 1, spec.intermediate, lanes=1, optional=True, dtype=U32),
        )
    if kind == Kind.PREDICTOR:
        return _predictor(spec, spec.ranks[layer])
    if layer == spec.n_layers:
        learned = spec.positions == "learned"
        table = Part("positions", spec.max_positions, hidden, lanes=1, dtype=F32)
        bias = _bias("head_bias", spec.vocab_size)
        return (*_norm(spec, "norm"), *((table,) if learned else ()), bias)
    parts = [*_norm(spec, "attn_norm"), *(_latent_heads if spec.latent else _heads)(spec)]
    parts += [Part("o", hidden, spec.attended), _bias("o_bias", hidden)]
    parts += _norm(spec, "attn_post_norm") if spec.post_norms else ()
    parts += () if spec.shared_norm else _norm(spec, "ffn_norm")
    parts += _norm(spec, "ffn_post_norm") if spec.post_norms else ()
    if spec.routed[layer]:
        parts += _routing(spec)
    return tuple(parts)


def _heads(spec: ModelSpec) -> list[Part]:
    q_rows, kv_rows = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    parts = [
        Part("q", q_rows, spec.hidden),
        Part("k", kv_rows, spec.hidden),
        Part("v", kv_rows, spec.hidden),
        _bias("q_bias", q_rows),
        _bias("k_bias", kv_rows),
        _bias("v_bias", kv_rows),
    ]
    if spec.qk_norm != "none":
        full = spec.qk_norm == "full"
        parts.append(_vector("q_norm", q_rows if full else spec.head_dim))
        parts.append(_vector("k_norm", kv_rows if full else spec.head_dim))
    parts += [_vector("sinks", spec.n_heads)] if spec.sinks else []
    return parts


def _latent_heads(spec: ModelSpec) -> list[Part]:
    """Of a query, and of the key that all heads share, the numbers that are rotated come first.
    `absorb` takes the rest of each head's query to what meets latents, `expand` takes latents to
    each head's value: a head's rows follow the last one's."""
    heads, dims, narrow = spec.n_heads, spec.rope.dims, spec.q_rank
    down = [Part("q_down", narrow, spec.hidden), _bias("q_down_bias", narrow)]
    return [
        *([*down, _vector("q_down_norm", narrow)] if narrow else ()),
        Part("q", heads * spec.head_dim, narrow or spec.hidden),
        Part("k", dims, spec.hidden),
        Part("latent", spec.latent, spec.hidden),
        _bias("k_bias", dims),
        _bias("latent_bias", spec.latent),
        _vector("latent_norm", spec.latent),
        Part("absorb", heads * spec.latent, spec.head_dim - dims),
        Part("expand", heads * spec.value_dim, spec.latent),
    ]


def _routing(spec: ModelSpec) -> list[Part]:
    parts = [Part("router", spec.n_experts, spec.hidden)]
    if spec.router_bias:
        parts.append(_vector("router_bias", spec.n_experts))
    if spec.shared_intermediate and spec.shared_gated:
        parts.append(Part("shared_gate", 1, spec.hidden))
    return [*parts, _bias("router_logit_bias", spec.n_experts)]


def _predictor(spec: ModelSpec, rank: int) -> tuple[Part, ...]:
    """It takes the place of an FFN's bundle, so that it has the biases of that as well."""
    width, inner = spec.intermediate, ("gate", "up") if spec.gated else ("up",)
    return (
        Part("reduce", rank, spec.hidden),
        Part("score", width, rank),
        _vector("score_bias", width),
        *(_bias(f"{name}_bias", width) for name in inner),
        _bias("down_bias", spec.hidden),
    )


def _norm(spec: ModelSpec, name: str) -> tuple[Part, ...]:
    names = (name, f"{name}_bias") if spec.norm == "layer" else (name,)
    return tuple(_vector(name, spec.hidden) for name in names)


def _vector(name: str, cols: int) -> Part:
    return Part(name, 1, cols, lanes=1, dtype=F32)


def _bias(name: str, cols: int) -> Part:
    return Part(name, 1, cols, lanes=1, optional=True, dtype=F32)


def _neuron_cols(spec: ModelSpec) -> int:
    """Columns of a neuron's row."""
    return neuron_parts(spec) * spec.hidden


def neuron_parts(spec: ModelSpec) -> int:
    """How many rows of `hidden` columns a neuron's row is made of: where there are predictors that
    of what decides, where there is a gate that of up, and the column of down."""
    return bool(spec.ranks) + spec.gated + 1


def table_rows(kind: Kind, dtype: DType, cols: int) -> int:
    """Rows of the vocabulary that an EMBED or HEAD bundle holds (the last may hold fewer)."""
    if kind == Kind.EMBED:
        return max(1, EMBED_BUNDLE_BYTES // matrix_bytes(dtype, 1, cols, 1))
    return LANES * max(1, HEAD_BUNDLE_BYTES // matrix_bytes(dtype, LANES, cols, LANES))


def bundle_order(spec: ModelSpec, layers: Iterable[int]) -> Iterator[tuple[Kind, int, int]]:
    """(kind, layer, index) of the bundles of `layers` in file order, vocabulary left out.

    Layer `spec.n_layers` stands for what is of no layer: the final norm, and learned positions.
    """
    for layer in layers:
        yield Kind.DENSE, layer, 0
        if layer == spec.n_layers:
            return
        if not spec.routed[layer]:
            yield Kind.FFN, layer, 0
            if spec.neurons:
                yield Kind.NEURONS, layer, 0
            if spec.ranks:
                yield Kind.PREDICTOR, layer, 0
            continue
        for expert in range(spec.n_experts):
            yield Kind.EXPERT, layer, expert
        if spec.shared_intermediate:
            yield Kind.SHARED, layer, 0


def check_bundles(entries: np.ndarray, meta: Meta) -> None:
    """Hold a directory to the spec: these bundles, in this order, with these segments and shapes.

    The bundles of one kind in one layer share one layout class, so that the first speaks for all.
    Raises CorruptError. The work is bounded by the number of entries, whatever the spec claims.
    """
    spec = meta.spec
    embeds = int((entries["kind"] == Kind.EMBED).sum())
    heads = int((entries["kind"] == Kind.HEAD).sum())
    middle = entries[embeds : len(entries) - heads]
    kinds, layers, indices, layouts = (
        middle[name].tolist() for name in ("kind", "layer", "index", "layout")
    )
    expected = bundle_order(spec, range(spec.n_layers + 1))
    found = zip(kinds, layers, indices, strict=True)
    if not all(a == b for a, b in zip_longest(found, expected)):
        raise CorruptError("the directory does not list the bundles of its model")
    classes = sorted(set(zip(kinds, layers, layouts, strict=True)))
    for (kind, layer, _), (next_kind, next_layer, _) in pairwise(classes):
        if (kind, layer) == (next_kind, next_layer):
            what = Kind(kind).name.lower()
            raise CorruptError(f"the {what} bundles of layer {layer} are not of one layout class")
    for kind, layer, layout in classes:
        _check_layout(meta.layouts[layout], bundle_parts(spec, Kind(kind), layer), layer)
        if kind == Kind.NEURONS:
            _check_neurons(meta.layouts[layout]["neurons"].dtype, spec.hidden, layer)
        if kind == Kind.PREDICTOR and len({s.dtype for s in meta.layouts[layout].segments[:2]}) > 1:
            raise CorruptError(f"the predictor of layer {layer} is not of one number format")
    _check_table(entries[:embeds], Kind.EMBED, meta, expected=not spec.tied)
    _check_table(entries[len(entries) - heads :], Kind.HEAD, meta, expected=True)


def _check_neurons(dtype: DType, hidden: int, layer: int) -> None:
    if dtype in GGUF_BLOCKS:
        raise CorruptError(f"the neurons of layer {layer} are in {dtype.name}, which rows are not")
    if hidden % dtype.block:
        raise CorruptError(f"the neurons of layer {layer} are not made of whole blocks")


def _check_layout(layout: Layout, parts: tuple[Part, ...], layer: int) -> None:
    wanted = [p for p in parts if not p.optional or p.name in layout]
    found = [(s.name, s.rows, s.cols, s.lanes) for s in layout.segments]
    if found != [(p.name, p.rows, p.cols, p.lanes) for p in wanted]:
        raise CorruptError(f"a bundle of layer {layer} does not have the segments of its model")
    for segment, part in zip(layout.segments, wanted, strict=True):
        if part.dtype is not None and segment.dtype is not part.dtype:
            raise CorruptError(f"segment {segment.name} of layer {layer} is not {part.dtype.name}")
        if part.dtype is None and segment.dtype is U32:
            raise CorruptError(f"segment {segment.name} of layer {layer} has no number format")


def _check_table(entries: np.ndarray, kind: Kind, meta: Meta, expected: bool) -> None:
    """Vocabulary rows: `rows` alone in each bundle, bundles equally full but for the last."""
    if not expected and len(entries) == 0:
        return
    what = kind.name.lower()
    layouts = [meta.layouts[i] for i in entries["layout"].tolist()]
    known = all("rows" in layout and layout["rows"].dtype is not U32 for layout in layouts)
    if not expected or not layouts or not known:
        raise CorruptError(f"the {what} bundles are not those of the model")
    first, spec = layouts[0]["rows"], meta.spec
    step = min(table_rows(kind, first.dtype, spec.hidden), spec.vocab_size)
    for index, layout in enumerate(layouts):
        rows = min(step, spec.vocab_size - index * step)
        lanes = 1 if kind == Kind.EMBED else LANES
        if rows < 1 or layout != Layout.build([("rows", first.dtype, lanes, rows, spec.hidden)]):
            raise CorruptError(f"{what} bundle {index} does not hold the rows that it should")
    whole = len(layouts) * step >= spec.vocab_size
    in_order = (entries["kind"] == kind).all() and (entries["layer"] == NO_LAYER).all()
    if not (whole and in_order and (entries["index"] == np.arange(len(entries))).all()):
        raise CorruptError(f"the {what} bundles do not hold the whole vocabulary")
