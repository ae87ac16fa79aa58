"""The pass through a model: embed, run the layers, read out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .._native import check, ffi, lib, pointer
from ..errors import CorruptError
from ..format import Kind
from ..kernels import Array, Core, Ops
from ..spec import ModelSpec
from .latent import add_latent_attention
from .layers import Block, Dense, Experts, Neurons, Norm, SharedExpert
from .layers import add_attended, add_attention
from .rope import attention_factor, frequencies_key, inverse_frequencies
from .workspace import Workspace

if TYPE_CHECKING:
    from ..kvcache import KvCache


class Layer:
    """One layer: attention, and after or beside it one or more feed-forward parts that read the
    same norm."""

    def __init__(self, work: Workspace, index: int, feed_forward: list[type]):
        spec, s = work.spec, work.scratch
        self._index = index
        self.ops = ops = work.ops()
        tensors = work.tensors(index)
        (add_latent_attention if spec.latent else add_attention)(work, index, ops, tensors)
        if not spec.parallel:
            add_attended(work, ops, tensors)
        if not spec.shared_norm:  # then h is still the norm that attention read
            x, h = s.x.pointer, s.h.pointer
            Norm(ops, tensors, "ffn_norm", spec.norm_eps, spec.hidden, x, h)
        if spec.parallel:
            add_attended(work, ops, tensors)
        block = Block(work, ops, tensors, "ffn_post_norm")
        block.open()
        parts = [part(work, index, ops, tensors) for part in feed_forward]
        block.close()
        ops.keep(parts)
        self.experts = next((p for p in parts if isinstance(p, Experts)), None)
        self.neurons = next((p for p in parts if isinstance(p, Neurons)), None)

    def run(self, kv: KvCache, n: int) -> None:
        self.ops.run(n, kv.layers[self._index], kv.position)


class Vocabulary:
    """Rows of the vocabulary: gathered as embeddings, or multiplied by as the output head."""

    def __init__(self, work: Workspace, kind: Kind):
        self._bundles, layouts = work.bundles(kind)
        self._segments = [layout["rows"] for layout in layouts]
        self._rows_per_bundle = self._segments[0].rows
        self._add_gather(work)
        self._add_table(work)

    def _add_gather(self, work: Workspace) -> None:
        first, n = self._segments[0], len(self._segments)
        self._addresses = Array(n, np.uint64)
        self.gathering = work.ops()
        self._gather_op = op = self.gathering.add(lib.EM_OP_GATHER, "gathering rows").gather
        op.stream, op.bundles = work.streamer.stream, pointer(self._bundles, "uint32_t *")
        op.n_bundles, op.rows_per_bundle = n, first.rows
        op.dtype, op.lanes, op.cols = first.dtype.code, first.lanes, first.cols
        op.addresses, op.out = self._addresses.pointer, work.scratch.x.pointer
        if work.spec.embedding_scale != 1.0:
            scale = self.gathering.add(lib.EM_OP_SCALE, "scaling embeddings").elements
            scale.x, scale.cols = work.scratch.x.pointer, work.spec.hidden
            scale.factor = work.spec.embedding_scale

    def _add_table(self, work: Workspace) -> None:
        self._items = ffi.new("em_linear[]", len(self._segments))
        rows, first = sum(segment.rows for segment in self._segments), 0
        last = work.tensors(work.spec.n_layers)
        for item, segment in zip(self._items, self._segments, strict=True):
            item.dtype, item.rows = segment.dtype.code, segment.rows
            item.cols, item.out_stride = segment.cols, rows
            if "head_bias" in last:
                item.bias = last.pointer("head_bias", "float *") + first
            first += segment.rows
        self.multiplying = work.ops()
        op = self.multiplying.add(lib.EM_OP_TABLE, "multiplying by the output head").table
        op.stream, op.bundles = work.streamer.stream, pointer(self._bundles, "uint32_t *")
        op.items, op.n_bundles = self._items, len(self._segments)
        op.rows_per_bundle, op.x = self._rows_per_bundle, work.scratch.h.pointer
        self._table_op = op
        self._logit_ops = [
            self.multiplying.add(kind, "scaling logits").elements
            for kind, wanted in (
                (lib.EM_OP_SCALE, work.spec.logit_scale != 1.0),
                (lib.EM_OP_CAP, work.spec.logit_cap > 0),
            )
            if wanted
        ]
        for op in self._logit_ops:
            op.cols, op.factor, op.limit = rows, work.spec.logit_scale, work.spec.logit_cap

    def embed(self, ids: np.ndarray) -> None:
        """scratch.x [n, hidden] = the rows of `ids`, int32 [n], each in the vocabulary, as they are
        or scaled."""
        ids = np.ascontiguousarray(ids, np.int32)
        wanted, uses = np.unique(ids // self._rows_per_bundle, return_counts=True)
        kept = (
            pointer(wanted.astype(np.uint32), "uint32_t *"),
            pointer(uses.astype(np.int32), "int32_t *"), pointer(ids, "int32_t *"),
        )  # fmt: skip
        op = self._gather_op
        op.wanted, op.uses, op.ids = kept
        op.n_wanted = len(wanted)
        self.gathering.run(len(ids))

    def read_out(self, n_tokens: int, logits: Array) -> None:
        """logits [n_tokens, vocab] = scratch.h [n_tokens, hidden] times the table, plus its bias,
        scaled and capped."""
        self._table_op.out = logits.pointer
        for op in self._logit_ops:
            op.x = logits.pointer
        self.multiplying.run(n_tokens)


class Decoder(ABC):
    """A pre-norm decoder; a model adds which feed-forward parts each of its layers has."""

    def __init__(self, store, streamer, core: Core, max_tokens: int, predict: bool = False):
        self.spec: ModelSpec = store.spec
        self._work = work = Workspace(store, streamer, core, max_tokens, predict)
        self._positions = self._learned_positions()
        self._layers = [Layer(work, i, self._parts(i)) for i in range(self.spec.n_layers)]
        for layer, following in pairwise(self._layers):
            if layer.experts is not None and following.experts is not None:
                layer.experts.foresee(following.experts)
        self._final = Ops(core)
        x, h = work.scratch.x.pointer, work.scratch.h.pointer
        tensors = work.tensors(self.spec.n_layers)
        self._norm = Norm(self._final, tensors, "norm", self.spec.norm_eps, self.spec.hidden, x, h)
        self._head = Vocabulary(work, Kind.HEAD)
        self._embedding = self._head if self.spec.tied else Vocabulary(work, Kind.EMBED)
        self._ops = (self._final, self._embedding.gathering, self._head.multiplying)
        self._logits = Array((1, self.spec.vocab_size))
        layers = range(self.spec.n_layers)
        self._dense = np.concatenate([work.bundles(Kind.DENSE, i)[0] for i in layers])
        self._last = work.bundles(Kind.DENSE, self.spec.n_layers)[0]
        self._frequencies = [(-1, None) for _ in self.spec.ropes]
        self.watch: Callable[[int, np.ndarray], None] | None = None
        """Is shown what each layer's feed-forward parts read of a step's tokens, [n, hidden]."""

    @abstractmethod
    def feed_forward(self, index: int) -> list[type]:
        """The classes of layer `index`'s feed-forward parts, in the order in which they add up."""

    def _parts(self, index: int) -> list[type]:
        """`feed_forward`, held to the spec, which comes from a file."""
        parts, routed = self.feed_forward(index), self.spec.routed[index]
        shared = routed and self.spec.shared_intermediate > 0
        if (Experts in parts, SharedExpert in parts) != (routed, shared):
            raise CorruptError(
                f"building a model: layer {index} of a {self.spec.model_type} model is not "
                f"{'routed' if routed else 'dense'} in this way; convert the checkpoint again"
            )
        return [Neurons if part is Dense and self.spec.neurons else part for part in parts]

    def step(self, ids: np.ndarray, kv: KvCache, n_logits: int = 1) -> np.ndarray:
        """Append tokens to a cache; float32 [n_logits, vocab] after the last, a view of scratch.

        ids: int32 [n], 1 ≤ n ≤ max_tokens, each in the vocabulary; kv has room for n more.
        """
        n = len(ids)
        self._work.streamer.use_resident(self._dense)
        self._embedding.embed(ids)
        if self._positions is None:
            self._rotate(kv, n)
        else:
            self._work.scratch.x.array[:n] += self._positions[kv.position : kv.position + n]
        for index, layer in enumerate(self._layers):
            layer.run(kv, n)
            if self.watch is not None:
                self.watch(index, self._work.scratch.h.array[:n])
        kv.position += n
        return self._read_out(n, n_logits)

    def rest(self, thresholds: Sequence[float]) -> None:
        """Let neurons of up to each layer's magnitude rest from now on (Neurons.rest)."""
        for layer, threshold in zip(self._layers, thresholds, strict=True):
            if layer.neurons is not None:
                layer.neurons.rest(threshold)

    def trim(self, n_tokens: int) -> None:
        """Give memory that steps of up to n tokens do not touch back until it is used again."""
        self._work.trim(n_tokens)

    def spent(self) -> Counter[str]:
        """Seconds that operations have worked so far, by what they were doing."""
        total = Counter()
        for ops in (*self._ops, *(layer.ops for layer in self._layers)):
            total.update(ops.spent())
        return total

    def _learned_positions(self) -> np.ndarray | None:
        """float32 [max_positions, hidden], where the store has them; then nothing is rotated."""
        spec, s = self.spec, self._work.scratch
        if spec.positions != "learned":
            return None
        for angles in s.angles:
            angles.cos.array[:], angles.sin.array[:] = 1.0, 0.0
        start = self._work.tensors(spec.n_layers).pointer("positions", "float *")
        table = ffi.buffer(start, 4 * spec.max_positions * spec.hidden)
        return np.frombuffer(table, np.float32).reshape(spec.max_positions, spec.hidden)

    def _rotate(self, kv: KvCache, n: int) -> None:
        spec, length = self.spec, max(kv.rope_length, kv.position + n)
        for i, (rope, angles) in enumerate(zip(spec.ropes, self._work.scratch.angles, strict=True)):
            key = frequencies_key(rope, length)
            if self._frequencies[i][0] != key:
                table = inverse_frequencies(rope, spec.head_dim, spec.max_positions, length)
                self._frequencies[i] = (key, np.ascontiguousarray(table))
            status = lib.em_rope_table(
                pointer(self._frequencies[i][1], "double *"), angles.dims, kv.position, n,
                attention_factor(rope, length), angles.cos.pointer, angles.sin.pointer,
            )  # fmt: skip
            check(status, "computing rotary angles")

    def _read_out(self, n: int, rows: int) -> np.ndarray:
        if len(self._logits.array) < rows:
            self._logits = Array((rows, self.spec.vocab_size))
        if rows > 0:
            self._norm.read(self._work.scratch.x.pointer + (n - rows) * self.spec.hidden)
            table = 0 if self._positions is None else self._positions.nbytes
            row = table // self.spec.max_positions
            self._work.streamer.use_resident(self._last, table - n * row)
            self._final.run(rows)
            self._head.read_out(rows, self._logits)
        return self._logits.array[:rows]
