"""A store that was calibrated: the same weights with thresholds; or with predictors, and rows that
hold all of a neuron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgemem.dtypes import F32, LANES, Q8_0, DType, group_bytes, scale_plane_bytes
from edgemem.errors import UnsupportedError
from edgemem.format import Kind, Layout, bundle_parts
from edgemem.kernels.reference import unpack
from edgemem.predictors.low_rank import Predictor
from edgemem.spec import ModelSpec
from edgemem.store import Store
from edgemem.writer import StoreWriter

from . import quantize
from .neurons import checksums

PREDICTOR_DTYPE = Q8_0

_CHUNK_GROUPS, _CHUNK_ROWS = 64, 1024
"""Groups of 16 neurons that are laid out at a time, and neurons that are written."""


def write(
    store: Store,
    target: Path,
    predictors: Sequence[Predictor | None],
    orders: Sequence[np.ndarray | None],
    judge: Callable[[Path], dict],
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write `store` with a predictor for each layer, and its neurons in an order (None where the
    FFN is not taken apart), to `target`, which may be itself; return its bytes.

    `judge(path)` runs what was written and says what belongs into `recipe.predictor`; then it gets
    its name. Predictors become q8_0. Nothing is left where anything fails. Raises StoreError,
    UnsupportedError for rows and deciding matrices of formats that have no common one, and what
    `judge` raises.
    """
    spec = replace(store.spec, ranks=tuple(p.rank if p is not None else 0 for p in predictors))
    recipe = {name: value for name, value in store.recipe.items() if name != "predictor"}

    def put(writer: StoreWriter, bundle: int) -> None:
        kind, layer = (int(store.entries[bundle][name]) for name in ("kind", "layer"))
        if kind == Kind.NEURONS:
            _write_neurons(writer, store, spec, layer, orders[layer])
            _write_predictor(writer, store, spec, layer, predictors[layer])
        elif kind != Kind.PREDICTOR:
            _copy(writer, store, bundle)

    with StoreWriter(target, store.page_size, force) as writer:
        _put_all(writer, store, put, progress)
        return writer.finish(
            spec, store.tokenizer_json, recipe=recipe, **_kept(store),
            judge=lambda path: recipe | {"predictor": judge(path)},
        )  # fmt: skip


def write_thresholds(
    store: Store, target: Path, thresholds: Sequence[float], said: dict, force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Write `store` with a threshold for each layer (0 where the FFN is not taken apart) to
    `target`, which may be itself; return its bytes. `said` goes into `recipe.sparse`. Raises
    StoreError."""
    spec = replace(store.spec, thresholds=tuple(thresholds))
    with StoreWriter(target, store.page_size, force) as writer:
        _put_all(writer, store, lambda writer, bundle: _copy(writer, store, bundle), progress)
        recipe = store.recipe | {"sparse": said}
        return writer.finish(spec, store.tokenizer_json, recipe=recipe, **_kept(store))


def _put_all(
    writer: StoreWriter, store: Store, put: Callable[[StoreWriter, int], None],
    progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    total, done = int(store.entries["payload_bytes"].sum(dtype=np.int64)), 0
    for bundle in range(len(store.entries)):
        put(writer, bundle)
        done += int(store.entries["payload_bytes"][bundle])
        if progress:
            progress(done, total)


def _copy(writer: StoreWriter, store: Store, bundle: int) -> None:
    kind, layer, index = (int(store.entries[bundle][n]) for n in ("kind", "layer", "index"))
    layout = store.layout_of(bundle)
    payload = bytearray(layout.payload_bytes)
    store.read(bundle, payload)
    with writer.bundle(Kind(kind), layer, index, layout) as out:
        out.write(payload)


def _kept(store: Store) -> dict:
    """What a store says beside weights that calibrating does not touch."""
    return {
        "chat_template": store.chat_template, "generation": store.generation,
        "tokenizer_config": store.tokenizer_config, "provenance": store.provenance,
    }  # fmt: skip


def stored(predictor: Predictor) -> Predictor:
    """As a store gives it back."""

    def again(matrix: np.ndarray) -> np.ndarray:
        return unpack(_packed(matrix), PREDICTOR_DTYPE, *matrix.shape, LANES).astype(np.float32)

    return replace(predictor, reduce=again(predictor.reduce), score=again(predictor.score))


def _write_predictor(
    writer: StoreWriter, store: Store, spec: ModelSpec, layer: int, predictor: Predictor
) -> None:
    ffn = int(store.find(Kind.FFN, layer)[0])
    there = store.layout_of(ffn)
    made = {"reduce": predictor.reduce, "score": predictor.score, "score_bias": predictor.bias}
    shapes = [
        (part.name, part.dtype or PREDICTOR_DTYPE, part.lanes, part.rows, part.cols)
        for part in bundle_parts(spec, Kind.PREDICTOR, layer)
        if not part.optional or part.name in there
    ]
    layout = Layout.build(shapes)
    with writer.bundle(Kind.PREDICTOR, layer, 0, layout) as out:
        for segment in layout.segments:
            out.begin(segment.name)
            if segment.name not in made:
                out.write(store.read_segment(ffn, there[segment.name]))
            elif segment.dtype is F32:
                out.write(made[segment.name].astype("<f4"))
            else:
                out.write(_packed(made[segment.name]))


def _packed(matrix: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    return quantize.pack(bits, F32, PREDICTOR_DTYPE, LANES)


def _write_neurons(
    writer: StoreWriter, store: Store, spec: ModelSpec, layer: int, order: np.ndarray
) -> None:
    rows, dtype = _whole_rows(store, layer, spec)
    places = np.empty(len(order), "<u4")
    places[order] = np.arange(len(order))
    made = {"checksums": checksums(rows).astype("<u4"), "places": places}
    layout = Layout.build([
        (part.name, part.dtype or dtype, part.lanes, part.rows, part.cols)
        for part in bundle_parts(spec, Kind.NEURONS, layer)
    ])  # fmt: skip
    with writer.bundle(Kind.NEURONS, layer, 0, layout) as out:
        out.begin("neurons")
        for first in range(0, len(order), _CHUNK_ROWS):
            out.write(rows[order[first : first + _CHUNK_ROWS]])
        for name, words in made.items():
            out.begin(name)
            out.write(words)


def _whole_rows(store: Store, layer: int, spec: ModelSpec) -> tuple[np.ndarray, DType]:
    """All of each neuron, uint8 [width, row bytes], and its format."""
    ffn, apart = (int(store.find(kind, layer)[0]) for kind in (Kind.FFN, Kind.NEURONS))
    decider, there = store.layout_of(ffn).segments[0], store.layout_of(apart)
    rows, segment = _groups(store, apart, there["neurons"]), there["neurons"]
    places = store.places(apart)
    rows = rows if places is None else rows[places]
    if store.spec.ranks:
        return rows, segment.dtype
    dtype, made = _common(decider.dtype, segment.dtype), []
    deciding = _groups(store, ffn, decider)
    for first in range(0, len(deciding), _CHUNK_GROUPS):
        some = _taken_apart(deciding[first : first + _CHUNK_GROUPS], decider.dtype, spec.hidden)
        those = rows[first * LANES : (first + _CHUNK_GROUPS) * LANES]
        others = _taken_apart(those, segment.dtype, segment.cols, 1)
        made.append(_together([some, others], [decider.dtype, segment.dtype], dtype, len(those)))
    return np.concatenate(made), dtype


def _common(deciding: DType, rows: DType) -> DType:
    if deciding == rows:
        return rows
    if deciding.is_block or rows.is_block:
        raise UnsupportedError(
            f"joining rows of {deciding.name} and of {rows.name}: they have no common format; "
            "convert the checkpoint again with one --dtype"
        )
    return F32


def _groups(store: Store, bundle: int, segment) -> np.ndarray:
    size = group_bytes(segment.dtype, segment.cols, segment.lanes)
    return np.frombuffer(store.read_segment(bundle, segment), np.uint8).reshape(-1, size)


def _taken_apart(
    groups: np.ndarray, dtype: DType, cols: int, lanes: int = LANES
) -> list[np.ndarray]:
    """The planes of a row each: scales, where there are any, and quants, by row."""
    if not dtype.is_block:
        item = quantize.BITS[dtype]
        values = groups[:, : cols * lanes * item.itemsize].copy().view(item)
        return [values.reshape(len(groups), cols, lanes).transpose(0, 2, 1).reshape(-1, cols)]
    blocks, plane = cols // dtype.block, scale_plane_bytes(dtype, cols, lanes)
    scales = groups[:, : blocks * lanes * 2].copy().view(np.uint16)
    quants = groups[:, plane : plane + blocks * lanes * dtype.quant_bytes].copy().view(np.uint32)
    return [
        plane.reshape(len(groups), -1, lanes).transpose(0, 2, 1).reshape(len(groups) * lanes, -1)
        for plane in (scales, quants)
    ]


def _together(parts, formats: list[DType], dtype: DType, count: int) -> np.ndarray:
    if not dtype.is_block:
        bits = [quantize.to_float(p[0][:count], f, dtype) for p, f in zip(parts, formats)]
        return quantize.pack(np.concatenate(bits, axis=1), dtype, dtype, 1)
    scales, quants = (np.concatenate([p[i][:count] for p in parts], axis=1) for i in (0, 1))
    cols = scales.shape[1] * dtype.block
    out = np.zeros((count, group_bytes(dtype, cols, 1)), np.uint8)
    plane = scale_plane_bytes(dtype, cols, 1)
    out[:, : scales.shape[1] * 2] = np.ascontiguousarray(scales).view(np.uint8)
    out[:, plane : plane + quants.shape[1] * 4] = np.ascontiguousarray(quants).view(np.uint8)
    return out
