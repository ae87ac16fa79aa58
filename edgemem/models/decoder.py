"""The pass through a model: embed, run the layers, read out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .._native import check, lib, pointer
from ..errors import CorruptError
from ..format import Kind
from ..kernels import Array, Core, Ops, Table
from ..spec import ModelSpec
from .layers import Attention, Experts, Norm, SharedExpert
from .rope import inverse_frequencies
from .workspace import Workspace

if TYPE_CHECKING:
    from ..kvcache import KvCache


class Layer:
    """One layer: attention, then one or more feed-forward parts that read the same norm."""

    def __init__(self, work: Workspace, index: int, feed_forward: list[type]):
        spec, s = work.spec, work.scratch
        self._work, self._index = work, index
        self._id, layouts = work.bundles(Kind.DENSE, index)
        layout = layouts[0]
        self._ops = ops = Ops(work.core)
        attention = Attention(work, ops, layout)
        x, h = s.x.pointer, s.h.pointer
        norm = Norm(ops, layout, "ffn_norm", spec.norm_eps, spec.hidden, x, h)
        self._feed_forward = [part(work, index, ops, layout) for part in feed_forward]
        self._parts = [attention, norm, *self._feed_forward]
        self.experts = next((p for p in self._feed_forward if isinstance(p, Experts)), None)
        self._address = None
        with work.streamer.hold(self._id) as addresses:
            self._bind(int(addresses[0]))

    def _bind(self, address: int) -> None:
        if address != self._address:
            for part in self._parts:
                part.bind(address)
            self._address = address

    def run(self, kv: KvCache, n: int) -> None:
        with self._work.streamer.hold(self._id) as addresses:
            self._bind(int(addresses[0]))
            self._ops.run(n, kv.layers[self._index], kv.position)
            for part in self._feed_forward:
                part.run(n)


class Vocabulary:
    """Rows of the vocabulary: gathered as embeddings, or multiplied by as the output head."""

    def __init__(self, work: Workspace, kind: Kind):
        self._work = work
        self._ids, layouts = work.bundles(kind)
        self._table = Table(work.core, layouts)

    def embed(self, ids: np.ndarray, out: Array) -> None:
        """out [n, hidden] = the rows of `ids`, int32 [n], each in the vocabulary."""
        ids = np.ascontiguousarray(ids, np.int32)
        wanted, uses = np.unique(ids // self._table.rows_per_bundle, return_counts=True)
        for bundles in self._work.streamer.rounds(self._ids[wanted], uses, len(ids)):
            bundles.wait()
            here = wanted[bundles.first : bundles.first + len(bundles.addresses)]
            self._table.gather(ids, out, here, bundles.addresses)

    def read_out(self, x, n_tokens: int, out: Array) -> None:
        """out [n_tokens, vocab] = the logits of x, a float pointer to [n_tokens, hidden]."""
        for bundles in self._work.streamer.rounds(self._ids, None, n_tokens):
            bundles.wait()
            self._table.multiply(x, n_tokens, out, bundles.first, bundles.addresses)


class Decoder(ABC):
    """A pre-norm decoder; a model adds which feed-forward parts each of its layers has."""

    def __init__(self, store, streamer, core: Core, max_tokens: int):
        self.spec: ModelSpec = store.spec
        self._work = work = Workspace(store, streamer, core, max_tokens)
        self._layers = [Layer(work, i, self._parts(i)) for i in range(self.spec.n_layers)]
        for layer, following in pairwise(self._layers):
            if layer.experts is not None:
                layer.experts.following = following.experts
        self._final_id, final = work.bundles(Kind.DENSE, self.spec.n_layers)
        self._final = Ops(core)
        x, h = work.scratch.x.pointer, work.scratch.h.pointer
        self._final_norm = Norm(
            self._final, final[0], "norm", self.spec.norm_eps, self.spec.hidden, x, h
        )
        self._head = Vocabulary(work, Kind.HEAD)
        self._embedding = self._head if self.spec.tied else Vocabulary(work, Kind.EMBED)
        self._logits = Array((1, self.spec.vocab_size))
        self._frequencies = (0, None)

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
        return parts

    def step(self, ids: np.ndarray, kv: KvCache, n_logits: int = 1) -> np.ndarray:
        """Append tokens to a cache; float32 [n_logits, vocab] after the last, a view of scratch.

        ids: int32 [n], 1 ≤ n ≤ max_tokens, each in the vocabulary; kv has room for n more.
        """
        n, s = len(ids), self._work.scratch
        self._embedding.embed(ids, s.x)
        self._rotate(kv, n)
        for layer in self._layers:
            layer.run(kv, n)
        kv.position += n
        return self._read_out(n, n_logits)

    def trim(self, n_tokens: int) -> None:
        """Give memory that steps of up to n tokens do not touch back until it is used again."""
        self._work.trim(n_tokens)

    def _rotate(self, kv: KvCache, n: int) -> None:
        spec, s = self.spec, self._work.scratch
        length = max(kv.rope_length, kv.position + n) if spec.rope.type == "dynamic" else 1
        if self._frequencies[0] != length:
            table = inverse_frequencies(spec.rope, spec.head_dim, spec.max_positions, length)
            self._frequencies = (length, np.ascontiguousarray(table))
        status = lib.em_rope_table(
            pointer(self._frequencies[1], "double *"), spec.head_dim, kv.position, n,
            spec.rope.attention_factor, s.cos.pointer, s.sin.pointer,
        )  # fmt: skip
        check(status, "computing rotary angles")

    def _read_out(self, n: int, rows: int) -> np.ndarray:
        s, hidden = self._work.scratch, self.spec.hidden
        if rows == 0:
            return self._logits.array[:0]
        if len(self._logits.array) < rows:
            self._logits = Array((rows, self.spec.vocab_size))
        with self._work.streamer.hold(self._final_id) as addresses:
            self._final_norm.bind(int(addresses[0]))
            self._final_norm.read(s.x.pointer + (n - rows) * hidden)
            self._final.run(rows)
        self._head.read_out(s.h.pointer, rows, self._logits)
        return self._logits.array[:rows]
