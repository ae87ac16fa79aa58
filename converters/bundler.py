"""From tensors to bundles: what each bundle of a store is made of, and its streaming into a writer.

Planning looks at names and shapes only and finds everything that is missing, left over or misshapen
before a byte is written. Writing reads a few MiB of rows at a time; a few threads read and pack
ahead while the caller's thread writes, in the order of the plan, so the store's bytes are always
the same.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from edgemem.dtypes import BY_NAME, CONVERSIONS, F16, F32, LANES, Q8_0, DType
from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import (
    NO_LAYER,
    Kind,
    Layout,
    Part,
    Segment,
    bundle_order,
    bundle_parts,
    table_rows,
)
from edgemem.spec import ModelSpec
from edgemem.writer import StoreWriter

from . import blocks, kquants, naming, neurons
from .checkpoint import Tensor
from .configuration import Description
from .families import OWN

_WEIGHTS = {name: BY_NAME[name] for name in CONVERSIONS if name != "keep"}
_TABLES = {name: F16 if name == "f16" else Q8_0 for name in _WEIGHTS}
"""Vocabulary tables stay at 8 bits: errors in them reach every logit."""

_KEPT = ("router", "shared_gate")
"""Small matrices that decide what is computed, kept as they are."""

_MANY_MISSING = 1000
"""Planning ends here, however many layers and experts a config claims."""

_CHUNK_BYTES = 4 << 20
_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Piece:
    """One segment and the rows that it is made of."""

    segment: Segment
    tensor: Tensor
    source: naming.Source

    def chunks(self) -> Iterator[_Chunk]:
        """Some rows at a time, in order."""
        rows, step = self.segment.rows, _chunk_rows(self.tensor, self.segment.lanes)
        return (_Chunk(self, first, min(step, rows - first)) for first in range(0, rows, step))


@dataclass(frozen=True)
class Checksums:
    """A segment that is made of what was written before it."""

    segment: Segment

    def chunks(self) -> Iterator[_Chunk]:
        """None: nothing is read for it."""
        return iter(())


@dataclass(frozen=True)
class PlannedBundle:
    """One bundle of the store to be, and what its segments are made of, in their order."""

    kind: Kind
    layer: int
    index: int
    layout: Layout
    pieces: tuple[Piece | neurons.NeuronsPiece | Checksums, ...]


@dataclass(frozen=True)
class Plan:
    """All bundles of a store in file order. `spec` is the config's, corrected by what is there;
    `notes` are lines for people: which matrices are not in the number format that was asked for."""

    spec: ModelSpec
    bundles: tuple[PlannedBundle, ...]
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def payload_bytes(self) -> int:
        return sum(bundle.layout.payload_bytes for bundle in self.bundles)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of tensors that will be read."""
        return sum(c.source_bytes for b in self.bundles for p in b.pieces for c in p.chunks())


def plan(
    description: Description, tensors: dict[str, Tensor], dtype: str, apart: bool = False
) -> Plan:
    """`apart`: whether FFNs are taken apart into neurons.

    Raises CheckpointError naming tensors that are missing, left over or of another shape, and
    UnsupportedError for an FFN that cannot be taken apart as asked.
    """
    return _Planner(description, tensors, dtype).plan(apart)


class _Planner:
    def __init__(self, description: Description, tensors: dict[str, Tensor], dtype: str):
        self.spec = description.spec
        self.biases = description.biases
        self.tensors = tensors
        self.dtype = dtype
        self.names = OWN.get(self.spec.model_type, naming)
        self.prefix = naming.prefix_of(tensors, self.names.EMBED, self.names.PREFIXES)
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.broken: dict[str, int] = {}
        self.layouts: dict[tuple, Layout] = {}
        self.parts: dict[tuple[Kind, int], tuple[Part, ...]] = {}

    def plan(self, apart: bool) -> Plan:
        embed, head = self._tables()
        if apart:
            self._take_apart()
        spec = self.spec
        bundles = [] if spec.tied else self._table(Kind.EMBED, embed)
        bundles += [
            self._bundle(kind, layer, index)
            for kind, layer, index in bundle_order(spec, range(spec.n_layers + 1))
        ]
        bundles += self._table(Kind.HEAD, head)
        self._check_names()
        bundles = self._of_one_class(bundles)
        parameters = sum(self.tensors[name].elements for name in self.used)
        return Plan(spec, tuple(bundles), parameters, tuple(self._notes()))

    def _tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The embedding and output tables; one and the same if tied.

        As in transformers, a tied model whose file has two tables that differ is not tied, and one
        that has only the output table takes its embedding from it.
        """
        shape = (self.spec.vocab_size, self.spec.hidden)
        embed = naming.Source(self.prefix + self.names.EMBED, shape)
        found = [name for name in self.names.HEAD if name in self.tensors]
        head = naming.Source((found or self.names.HEAD)[0], shape)
        both = embed.tensor in self.tensors and head.tensor in self.tensors
        if self.spec.tied and not both:
            taken = self._take([embed, head])
            return (taken[0], taken[0]) if taken else (None, None)
        tables = [taken[0] if taken else None for taken in map(self._take, ([embed], [head]))]
        if self.spec.tied and not _equal(*tables):
            self.spec = replace(self.spec, tied=False)
        return tuple(tables)

    def _take_apart(self) -> None:
        """Let the spec say that FFNs are taken apart."""
        layers = [i for i, routed in enumerate(self.spec.routed) if not routed]
        sources = [s for i in layers for where in self._neuron_sources(i) for s in where]
        found = [self.tensors[s.tensor] for s in sources if s.tensor in self.tensors]
        why = neurons.obstacle(self.spec, found, _WEIGHTS.get(self.dtype))
        if why is not None:
            raise UnsupportedError(f"converting to neurons: {why}; leave --neurons out")
        self.spec = neurons.taken_apart(self.spec)

    def _neuron_sources(self, layer: int) -> list[list[naming.Source]]:
        """Where a layer's up is, where a gate decides in its place, and down."""
        parts = neurons.plain_parts(self.spec, layer)
        wanted = [parts[name] for name in (("up", "down") if self.spec.gated else ("down",))]
        return [
            self.names.sources(self.spec, self.prefix, Kind.FFN, layer, 0, part) for part in wanted
        ]

    def _neurons(self, layer: int) -> PlannedBundle:
        found, shapes = [self._take(where) for where in self._neuron_sources(layer)], []
        if None not in found:
            dtype = neurons.format_of([t[0] for t in found], _WEIGHTS.get(self.dtype))
            for part in bundle_parts(self.spec, Kind.NEURONS, layer):
                if not part.optional:
                    kind = part.dtype or dtype
                    shapes.append((part.name, kind, part.lanes, part.rows, part.cols))
        planned = self._planned(Kind.NEURONS, layer, 0, shapes, [None] * len(shapes))
        if not shapes:
            return planned
        rows, sums = planned.layout.segments
        up = found[0] if self.spec.gated else None
        return replace(planned, pieces=(neurons.NeuronsPiece(rows, up, found[-1]), Checksums(sums)))

    def _bundle(self, kind: Kind, layer: int, index: int) -> PlannedBundle:
        if kind == Kind.NEURONS:
            return self._neurons(layer)
        shapes, found = [], []
        if (kind, layer) not in self.parts:
            self.parts[kind, layer] = bundle_parts(self.spec, kind, layer)
        for part in self.parts[kind, layer]:
            if part.optional and part.name not in self.biases:
                continue
            where = self.names.sources(self.spec, self.prefix, kind, layer, index, part)
            taken = self._take(where)
            if taken:
                dtype = self._format(part, *taken)
                shapes.append((part.name, dtype, part.lanes, part.rows, part.cols))
                found.append(taken)
        return self._planned(kind, layer, index, shapes, found)

    def _table(self, kind: Kind, tensor: Tensor | None) -> list[PlannedBundle]:
        if tensor is None:
            return []
        vocab, cols = self.spec.vocab_size, self.spec.hidden
        dtype = _TABLES.get(self.dtype) or tensor.dtype
        step, lanes = table_rows(kind, dtype, cols), 1 if kind == Kind.EMBED else LANES
        return [
            self._planned(
                kind,
                NO_LAYER,
                index,
                [("rows", dtype, lanes, min(step, vocab - first), cols)],
                [(tensor, naming.Source(tensor.name, tensor.shape, first))],
            )
            for index, first in enumerate(range(0, vocab, step))
        ]

    def _planned(self, kind, layer, index, shapes, found) -> PlannedBundle:
        """Bundles of one class share one Layout object: there may be tens of thousands."""
        key = tuple(shapes)
        if key not in self.layouts:
            self.layouts[key] = Layout.build(shapes) if shapes else Layout(())
        layout = self.layouts[key]
        pieces = (
            Piece(s, *taken) for s, taken in zip(layout.segments, found, strict=True) if taken
        )
        return PlannedBundle(kind, layer, index, layout, tuple(pieces))

    def _of_one_class(self, bundles: list[PlannedBundle]) -> list[PlannedBundle]:
        """The experts of a layer share one layout: where their floats differ, they are widened."""
        found: dict[int, set[Layout]] = defaultdict(set)
        for bundle in bundles:
            if bundle.kind == Kind.EXPERT:
                found[bundle.layer].add(bundle.layout)
        wide = {layer: _widest(layouts) for layer, layouts in found.items() if len(layouts) > 1}
        return [
            _laid_out(bundle, wide[bundle.layer])
            if bundle.kind == Kind.EXPERT and bundle.layer in wide
            else bundle
            for bundle in bundles
        ]

    def _format(self, part: Part, tensor: Tensor, source: naming.Source) -> DType:
        if part.lanes == 1:
            return F32
        if self.dtype == "keep" or part.name in _KEPT:
            return source.dtype(tensor)
        target = _WEIGHTS[self.dtype]
        if target not in kquants.FALLBACKS or part.cols % target.block == 0:
            return target
        self.broken[tensor.name] = part.cols
        return kquants.FALLBACKS[target]

    def _notes(self) -> Iterator[str]:
        if self.broken:
            target = _WEIGHTS[self.dtype]
            name, cols = next(iter(self.broken.items()))
            more = f", and {len(self.broken) - 1} more" if len(self.broken) > 1 else ""
            yield (
                f"{kquants.FALLBACKS[target].name} instead of {target.name}, whose blocks have "
                f"{target.block} columns: for {name:.200}, which has {cols}{more}"
            )

    def _take(self, candidates: list[naming.Source]) -> tuple[Tensor, naming.Source] | None:
        """The first candidate that is there; its shape and type must be right."""
        for source in candidates:
            tensor = self.tensors.get(source.tensor)
            if tensor is None:
                continue
            if tensor.shape != source.shape:
                raise CheckpointError(
                    f"reading {tensor.file.path}: tensor {tensor.name} has the shape "
                    f"{list(tensor.shape)}, config.json asks for {list(source.shape)}"
                )
            self.used.add(source.tensor)
            # Asked now, since it raises for what a store cannot hold.
            if tensor.dtype.is_block and (source.transposed or source.items):
                raise UnsupportedError(
                    f"reading {tensor.file.path}: tensor {tensor.name} is in blocks of "
                    f"{tensor.dtype.name}; it is supported in floats only"
                )
            return tensor, source
        self.missing.append(candidates[0].tensor)
        if len(self.missing) > _MANY_MISSING:
            self._check_names()
        return None

    def _check_names(self) -> None:
        if self.missing:
            raise CheckpointError(
                f"converting: the checkpoint lacks {_some(self.missing)}; "
                "fetch all of its files, and check that config.json belongs to them"
            )
        unused = getattr(self.names, "unused", lambda spec, name: False)
        left = [n for n in self.tensors if n not in self.used and naming.is_weight(n)]
        left = [n for n in left if not unused(self.spec, n)]
        if left:
            raise CheckpointError(
                f"converting: the checkpoint has tensors that config.json has no use for: "
                f"{_some(sorted(left))}; check that config.json belongs to them"
            )


def _widest(layouts: set[Layout]) -> Layout:
    """The layout whose floats hold the values of all of them: f32 where two formats differ."""
    shapes = []
    for same in zip(*(layout.segments for layout in layouts), strict=True):
        formats, first = {segment.dtype for segment in same}, same[0]
        dtype = first.dtype if len(formats) == 1 else F32
        shapes.append((first.name, dtype, first.lanes, first.rows, first.cols))
    return Layout.build(shapes)


def _laid_out(bundle: PlannedBundle, layout: Layout) -> PlannedBundle:
    pieces = zip(layout.segments, bundle.pieces, strict=True)
    return replace(
        bundle, layout=layout, pieces=tuple(replace(piece, segment=s) for s, piece in pieces)
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"{name:.200}" for name in names[:4]) + more


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits."""
    if a.type_name != b.type_name:
        return False
    step = _chunk_rows(a, 1)
    rows = range(0, a.shape[0], step)
    return all(
        np.array_equal(a.read_rows(r, n), b.read_rows(r, n))
        for r, n in ((r, min(step, a.shape[0] - r)) for r in rows)
    )


def _chunk_rows(tensor: Tensor, lanes: int) -> int:
    """Rows to read at a time: whole groups, a few MiB."""
    return max(1, _CHUNK_BYTES // (max(1, tensor.row_bytes) * lanes)) * lanes


# --- Writing --------------------------------------------------------------------------------------


def write(plan: Plan, writer: StoreWriter, progress: Callable[[int, int], None] | None) -> None:
    """Stream every bundle of the plan into `writer`.

    `progress(done_bytes, total_bytes)` counts bytes of tensors. Raises CheckpointError for weights
    that cannot be stored, naming their tensor, and what `writer` raises.
    """
    chunks = (chunk for b in plan.bundles for piece in b.pieces for chunk in piece.chunks())
    done = 0
    with closing(_ahead(chunks)) as packed:
        for bundle in plan.bundles:
            with writer.bundle(bundle.kind, bundle.layer, bundle.index, bundle.layout) as out:
                sums = []
                for piece in bundle.pieces:
                    out.begin(piece.segment.name)
                    if isinstance(piece, Checksums):
                        out.write(np.concatenate(sums))
                    for chunk in piece.chunks():
                        data = next(packed)
                        out.write(data)
                        if bundle.kind == Kind.NEURONS:
                            sums.append(neurons.checksums(data))
                        done += chunk.source_bytes
                        if progress:
                            progress(done, plan.source_bytes)


@dataclass(frozen=True)
class _Chunk:
    piece: Piece
    first: int
    count: int

    @property
    def source_bytes(self) -> int:
        return self.count * self.piece.tensor.row_bytes

    def pack(self) -> np.ndarray:
        tensor, segment = self.piece.tensor, self.piece.segment
        try:
            bits, dtype = self.piece.source.read(tensor, self.first, self.count)
            return blocks.pack(bits, dtype, segment.dtype, segment.lanes)
        except ValueError as error:
            raise CheckpointError(f"converting tensor {tensor.name}: {error}") from None


def _ahead(chunks: Iterable[_Chunk]) -> Iterator[np.ndarray]:
    """Packed chunks in order, a few of them in the making; ends its threads however it ends."""
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="pack")
    pending: deque = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(chunk.pack))
            if len(pending) > 2 * _WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
