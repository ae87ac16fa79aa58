"""The parts that models are made of, and the pass through them.

Activations live in one `Scratch` that all layers share; every operation is one native call on it. A
part knows where its tensors lie inside a bundle (from the bundle's layout) and is told where the
bundle is each time it runs.
"""

from abc import ABC, abstractmethod

import numpy as np

from .._native import check, ffi, lib, pointer
from ..dtypes import LANES, round_up
from ..format import Kind
from ..kernels import ACTIVATION_CODES, Array, Core, Linears, Table
from ..kvcache import KvCache
from ..spec import ModelSpec
from .rope import inverse_frequencies


class Scratch:
    """The activations of one step of up to `n_tokens` tokens."""

    def __init__(self, spec: ModelSpec, n_tokens: int):
        heads, kv_heads = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        self.x = Array((n_tokens, spec.hidden))  # the residual stream
        self.h = Array((n_tokens, spec.hidden))  # its norm, what a block reads
        self.q = Array((n_tokens, heads))
        self.k = Array((n_tokens, kv_heads))
        self.v = Array((n_tokens, kv_heads))
        self.attended = Array((n_tokens, heads))
        self.cos = Array((n_tokens, spec.head_dim // 2))
        self.sin = Array((n_tokens, spec.head_dim // 2))
        pairs = n_tokens * max(spec.top_k, 1)
        self.router = Array((n_tokens, max(spec.n_experts, 1)))
        self.experts = Array(max(spec.n_experts, 1), np.uint32)
        self.first = Array(spec.n_experts + 2, np.int32)
        self.tokens = Array(pairs, np.int32)
        self.weights = Array(pairs)
        self.shared_gate = Array(n_tokens)


def core_scratch_bytes(spec: ModelSpec, n_tokens: int, threads: int) -> int:
    """The most that one native call of a step takes from the core's scratch."""
    width = max(spec.intermediate, spec.shared_intermediate)
    needs = [
        lib.em_linear_scratch(n_tokens, max(spec.hidden, spec.n_heads * spec.head_dim)),
        lib.em_ffn_scratch(n_tokens, n_tokens, spec.hidden, max(width, 1)),
        2 * threads * round_up(spec.head_dim, LANES) * 4,
    ]
    if any(spec.routed):
        pairs = n_tokens * spec.top_k
        needs.append(lib.em_ffn_scratch(n_tokens, pairs, spec.hidden, spec.expert_intermediate))
        needs.append(lib.em_route_scratch(n_tokens, spec.n_experts, spec.top_k))
    return max(needs)


class Vector:
    """A norm's weight inside a bundle; `pointer` is good once bound."""

    def __init__(self, layout, name: str):
        self._offset = layout[name].offset
        self.pointer = ffi.NULL

    def bind(self, address: int) -> None:
        self.pointer = ffi.cast("float *", address + self._offset)


class Norm:
    """RMSNorm of rows of `cols` floats (arXiv 1910.07467)."""

    def __init__(self, core: Core, layout, name: str, eps: float, cols: int):
        self._core, self._eps, self._cols = core, eps, cols
        self._weight = Vector(layout, name)
        self.bind = self._weight.bind

    def run(self, x, rows: int, out) -> None:
        status = lib.em_rms_norm(
            self._core.handle, x, self._weight.pointer, self._eps, rows, self._cols, out
        )
        check(status, "normalising")


class Attention:
    """x += o(attend(rope(norm(q(h))), …)) with h = norm(x): grouped queries, f16 KV cache."""

    def __init__(self, model: "Decoder", index: int, layout):
        spec, core, s = model.spec, model.core, model.scratch
        self._model, self._index = model, index
        self._norm = Norm(core, layout, "attn_norm", spec.norm_eps, spec.hidden)
        self._qkv = Linears(
            core, layout,
            [("q", "q_bias", s.q, 0), ("k", "k_bias", s.k, 0), ("v", "v_bias", s.v, 0)],
        )  # fmt: skip
        self._out = Linears(core, layout, [("o", "o_bias", s.x, 0)], accumulate=True)
        self._parts = [self._norm, self._qkv, self._out]
        self._head_norms = []
        for name, heads, array in (("q_norm", spec.n_heads, s.q), ("k_norm", spec.n_kv_heads, s.k)):
            if spec.qk_norm == "none":
                continue
            full = spec.qk_norm == "full"
            rows, cols = (1, heads * spec.head_dim) if full else (heads, spec.head_dim)
            norm = Norm(core, layout, name, spec.norm_eps, cols)
            self._head_norms.append((norm, rows, array.pointer))
            self._parts.append(norm)

    def bind(self, address: int) -> None:
        for part in self._parts:
            part.bind(address)

    def run(self, kv: KvCache, n: int) -> None:
        model, s = self._model, self._model.scratch
        core, clip = model.core.handle, model.spec.clip_qkv
        self._norm.run(s.x.pointer, n, s.h.pointer)
        self._qkv.run(s.h.pointer, n)
        for norm, rows, array in self._head_norms:
            norm.run(array, n * rows, array)
        if clip:
            for part in (s.q, s.k, s.v):
                check(lib.em_clamp(part.pointer, n * part.array.shape[1], clip), "clipping q, k, v")
        layer = kv.layers[self._index]
        status = lib.em_attention_store(
            core, layer, s.q.pointer, s.k.pointer, s.v.pointer, s.cos.pointer, s.sin.pointer,
            kv.position, n,
        )  # fmt: skip
        check(status, "rotating and storing keys and values")
        status = lib.em_attention_run(
            core, layer, s.q.pointer, kv.position, n, s.attended.pointer
        )
        check(status, "attending")
        self._out.run(s.attended.pointer, n)


class GatedFfn:
    """x += down(act(gate(h)) * up(h)) over bundles of one layout (arXiv 2002.05202)."""

    def __init__(self, model: "Decoder", layout, intermediate: int):
        def at(name: str) -> int:
            return layout[name].offset if name in layout else -1

        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        self._model = model
        self._ffn = ffi.new("em_ffn *", {
            **{name: at(name) for name in names},
            **{f"{name}_dtype": layout[name].dtype.code for name in names[:3]},
            "hidden": model.spec.hidden, "intermediate": intermediate,
            "activation": ACTIVATION_CODES[model.spec.activation],
        })  # fmt: skip

    def run(self, addresses: np.ndarray, first, tokens, weights, n: int) -> None:
        """Bundle b computes pairs first[b]… of (token, weight); see em_ffn_run."""
        s = self._model.scratch
        status = lib.em_ffn_run(
            self._model.core.handle, self._ffn, len(addresses), pointer(addresses, "uint64_t *"),
            ffi.NULL, first, tokens, weights, s.h.pointer, n, s.x.pointer,
        )  # fmt: skip
        check(status, "computing a feed-forward network")


class Dense:
    """A feed-forward network that every token takes: one bundle, weight 1 for each token."""

    kind = Kind.FFN

    def __init__(self, model: "Decoder", index: int, dense_layout):
        spec = model.spec
        self._model = model
        self._id, layout = model.bundles(self.kind, index)
        shared = self.kind == Kind.SHARED
        width = spec.shared_intermediate if shared else spec.intermediate
        self._ffn = GatedFfn(model, layout[0], width)
        n_tokens = len(model.scratch.x.array)
        self._tokens = Array(n_tokens, np.int32)
        self._tokens.array[:] = np.arange(n_tokens)
        self._weights = Array(n_tokens)
        self._weights.array[:] = 1.0
        self._first = Array(2, np.int32)

    def bind(self, address: int) -> None:
        """Nothing of this part lies in the layer's dense bundle."""

    def run(self, n: int) -> None:
        self._first.array[1] = n
        with self._model.streamer.hold(self._id) as addresses:
            self._ffn.run(
                addresses, self._first.pointer, self._tokens.pointer, self._weights.pointer, n
            )


class SharedExpert(Dense):
    """An expert that every token takes, weighted by the sigmoid of its own gate."""

    kind = Kind.SHARED

    def __init__(self, model: "Decoder", index: int, dense_layout):
        super().__init__(model, index, dense_layout)
        self._gate = Linears(model.core, dense_layout, [("shared_gate", None, self._weights, 0)])
        self.bind = self._gate.bind

    def run(self, n: int) -> None:
        self._gate.run(self._model.scratch.h.pointer, n)
        check(lib.em_sigmoid(self._model.core.handle, self._weights.pointer, n), "gating")
        super().run(n)


class Experts:
    """A mixture of experts: each token takes its top k, weighted by the router's softmax."""

    def __init__(self, model: "Decoder", index: int, dense_layout):
        self._model = model
        self._ids, layouts = model.bundles(Kind.EXPERT, index)
        self._ffn = GatedFfn(model, layouts[0], model.spec.expert_intermediate)
        router = [("router", None, model.scratch.router, 0)]
        self._router = Linears(model.core, dense_layout, router)
        self.bind = self._router.bind

    def route(self, n: int) -> np.ndarray:
        """uint32: the bundles that these tokens need, ascending."""
        spec, s = self._model.spec, self._model.scratch
        self._router.run(s.h.pointer, n)
        wanted = lib.em_route(
            self._model.core.handle, s.router.pointer, n, spec.n_experts, spec.top_k,
            spec.normalize_top_k, s.experts.pointer, s.first.pointer, s.tokens.pointer,
            s.weights.pointer,
        )  # fmt: skip
        assert wanted >= 0, "routing: the core refused its arguments"
        return self._ids[s.experts.array[:wanted]]

    def run(self, n: int) -> None:
        s = self._model.scratch
        with self._model.streamer.hold(self.route(n)) as addresses:
            self._ffn.run(addresses, s.first.pointer, s.tokens.pointer, s.weights.pointer, n)


class Layer:
    """One layer: attention, then one or more feed-forward parts that read the same norm."""

    def __init__(self, model: "Decoder", index: int, feed_forward: list[type]):
        self._model = model
        self._id, layouts = model.bundles(Kind.DENSE, index)
        layout = layouts[0]
        self._attention = Attention(model, index, layout)
        self._norm = Norm(model.core, layout, "ffn_norm", model.spec.norm_eps, model.spec.hidden)
        self._feed_forward = [part(model, index, layout) for part in feed_forward]
        self._address = None

    def _bind(self, address: int) -> None:
        if address != self._address:
            for part in (self._attention, self._norm, *self._feed_forward):
                part.bind(address)
            self._address = address

    def run(self, kv: KvCache, n: int) -> None:
        s = self._model.scratch
        with self._model.streamer.hold(self._id) as addresses:
            self._bind(int(addresses[0]))
            self._attention.run(kv, n)
            self._norm.run(s.x.pointer, n, s.h.pointer)
            for part in self._feed_forward:
                part.run(n)


class Vocabulary:
    """Rows of the vocabulary: gathered as embeddings, or multiplied by as the output head."""

    def __init__(self, model: "Decoder", kind: Kind):
        self._model = model
        self._ids, layouts = model.bundles(kind)
        self._table = Table(model.core, layouts, np.zeros(len(self._ids)))

    def embed(self, ids: np.ndarray, out: Array) -> None:
        """out [n, hidden] = the rows of `ids`, int32 [n], each in the vocabulary."""
        ids = np.ascontiguousarray(ids, np.int32)
        wanted = np.unique(ids // self._table.rows_per_bundle)
        with self._model.streamer.hold(self._ids[wanted]) as addresses:
            self._table.addresses[wanted] = addresses
            self._table.gather(ids, out)

    def read_out(self, x, n_tokens: int, out: Array) -> None:
        """out [n_tokens, vocab] = the logits of x, a float pointer to [n_tokens, hidden]."""
        with self._model.streamer.hold(self._ids) as addresses:
            self._table.addresses[:] = addresses
            self._table.multiply(x, n_tokens, out)


class Decoder(ABC):
    """A pre-norm decoder; a model adds which feed-forward parts each of its layers has."""

    def __init__(self, store, streamer, core: Core, max_tokens: int):
        self.spec: ModelSpec = store.spec
        self.streamer, self.core, self.max_tokens = streamer, core, max_tokens
        self._store = store
        self.scratch = Scratch(self.spec, max_tokens)
        core.reserve(core_scratch_bytes(self.spec, max_tokens, core.threads))
        self._layers = [
            Layer(self, i, self.feed_forward(i)) for i in range(self.spec.n_layers)
        ]
        self._final_id, final = self.bundles(Kind.DENSE, self.spec.n_layers)
        self._final_norm = Norm(core, final[0], "norm", self.spec.norm_eps, self.spec.hidden)
        self._head = Vocabulary(self, Kind.HEAD)
        self._embedding = self._head if self.spec.tied else Vocabulary(self, Kind.EMBED)
        self._logits = Array((1, self.spec.vocab_size))
        self._frequencies = (0, None)

    @abstractmethod
    def feed_forward(self, index: int) -> list[type]:
        """The classes of layer `index`'s feed-forward parts, in the order in which they add up."""

    def bundles(self, kind: Kind, layer: int | None = None):
        """(ids uint32 [n], their layouts) of one kind of bundle in one layer."""
        ids = self._store.find(kind) if layer is None else self._store.find(kind, layer)
        ids = np.ascontiguousarray(ids, np.uint32)
        return ids, [self._store.layout_of(int(i)) for i in ids]

    def step(self, ids: np.ndarray, kv: KvCache, n_logits: int = 1) -> np.ndarray:
        """Append tokens to a cache; float32 [n_logits, vocab] after the last ones, a view of scratch.

        ids: int32 [n], 1 ≤ n ≤ max_tokens, each in the vocabulary; kv has room for n more.
        """
        n, s = len(ids), self.scratch
        self._embedding.embed(ids, s.x)
        self._rotate(kv, n)
        for layer in self._layers:
            layer.run(kv, n)
        kv.position += n
        return self._read_out(n, n_logits)

    def _rotate(self, kv: KvCache, n: int) -> None:
        spec, s = self.spec, self.scratch
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
        s, hidden = self.scratch, self.spec.hidden
        if rows == 0:
            return self._logits.array[:0]
        if len(self._logits.array) < rows:
            self._logits = Array((rows, self.spec.vocab_size))
        with self.streamer.hold(self._final_id) as addresses:
            self._final_norm.bind(int(addresses[0]))
            self._final_norm.run(s.x.pointer + (n - rows) * hidden, rows, s.h.pointer)
        self._head.read_out(s.h.pointer, rows, self._logits)
        return self._logits.array[:rows]
