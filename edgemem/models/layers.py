"""The parts that layers are made of.

Activations live in one `Scratch` that all parts share; every operation is one native call on it. A
part knows where its tensors lie inside a bundle (from the bundle's layout) and is told where the
bundle is each time that changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._native import check, ffi, lib, pointer
from ..format import Kind
from ..kernels import ACTIVATION_CODES, Array, Core, Linears
from .workspace import Workspace

if TYPE_CHECKING:
    from ..kvcache import KvCache


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
    """x += o(attend(rope(norm(q(h))), …)) with h = norm(x): grouped queries, KV cache."""

    def __init__(self, work: Workspace, index: int, layout):
        spec, core, s = work.spec, work.core, work.scratch
        self._work, self._index = work, index
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
        work, s = self._work, self._work.scratch
        core, clip = work.core.handle, work.spec.clip_qkv
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
        status = lib.em_attention_run(core, layer, s.q.pointer, kv.position, n, s.attended.pointer)
        check(status, "attending")
        self._out.run(s.attended.pointer, n)


class GatedFfn:
    """x += down(act(gate(h)) * up(h)) over bundles of one layout (arXiv 2002.05202)."""

    def __init__(self, work: Workspace, layout, intermediate: int):
        def at(name: str) -> int:
            return layout[name].offset if name in layout else -1

        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        self._work = work
        self._ffn = ffi.new("em_ffn *", {
            **{name: at(name) for name in names},
            **{f"{name}_dtype": layout[name].dtype.code for name in names[:3]},
            "hidden": work.spec.hidden, "intermediate": intermediate,
            "activation": ACTIVATION_CODES[work.spec.activation],
        })  # fmt: skip

    def run(self, bundles, first, tokens, weights, n: int) -> None:
        """Bundle b computes pairs first[b]… of (token, weight); see em_ffn_run."""
        s, addresses = self._work.scratch, bundles.addresses
        status = lib.em_ffn_run(
            self._work.core.handle, self._ffn, len(addresses), pointer(addresses, "uint64_t *"),
            bundles.ready, bundles.ids, first + bundles.first, tokens, weights, s.h.pointer, n,
            s.x.pointer,
        )  # fmt: skip
        if status == lib.EM_FLASH:
            raise self._work.streamer.error()
        check(status, "computing a feed-forward network")


class Dense:
    """A feed-forward network that every token takes: one bundle, weight 1 for each token."""

    kind = Kind.FFN

    def __init__(self, work: Workspace, index: int, dense_layout):
        spec = work.spec
        self._work = work
        self._id, layout = work.bundles(self.kind, index)
        shared = self.kind == Kind.SHARED
        width = spec.shared_intermediate if shared else spec.intermediate
        self._ffn = GatedFfn(work, layout[0], width)
        n_tokens = len(work.scratch.x.array)
        self._tokens = Array(n_tokens, np.int32)
        self._tokens.array[:] = np.arange(n_tokens)
        self._weights = Array(n_tokens)
        self._weights.array[:] = 1.0
        self._first = Array(2, np.int32)

    def bind(self, address: int) -> None:
        """Nothing of this part lies in the layer's dense bundle."""

    def run(self, n: int) -> None:
        first, tokens, weights = self._first, self._tokens, self._weights
        first.array[1] = n
        for bundles in self._work.streamer.rounds(self._id, None, n):
            self._ffn.run(bundles, first.pointer, tokens.pointer, weights.pointer, n)


class SharedExpert(Dense):
    """An expert that every token takes, weighted by the sigmoid of its own gate."""

    kind = Kind.SHARED

    def __init__(self, work: Workspace, index: int, dense_layout):
        super().__init__(work, index, dense_layout)
        self._gate = Linears(work.core, dense_layout, [("shared_gate", None, self._weights, 0)])
        self.bind = self._gate.bind

    def run(self, n: int) -> None:
        self._gate.run(self._work.scratch.h.pointer, n)
        check(lib.em_sigmoid(self._work.core.handle, self._weights.pointer, n), "gating")
        super().run(n)


class Experts:
    """A mixture of experts: each token takes its top k, weighted by the router's softmax.

    `following` is the next layer's, if that is routed too: it foresees what it will want.
    """

    following: Experts | None = None

    def __init__(self, work: Workspace, index: int, dense_layout):
        spec, s = work.spec, work.scratch
        self._work = work
        self._ids, layouts = work.bundles(Kind.EXPERT, index)
        self._ffn = GatedFfn(work, layouts[0], spec.expert_intermediate)
        self._norm = Norm(work.core, dense_layout, "ffn_norm", spec.norm_eps, spec.hidden)
        self._router = Linears(work.core, dense_layout, [("router", None, s.routing.logits, 0)])
        self._foreseer = Linears(work.core, dense_layout, [("router", None, s.foreseen.logits, 0)])

    def bind(self, address: int) -> None:
        for part in (self._norm, self._router, self._foreseer):
            part.bind(address)

    def run(self, n: int) -> None:
        s = self._work.scratch
        self._router.run(s.h.pointer, n)
        routing = s.routing
        wanted = self._ids[routing.choose(self._work, n)]
        uses = routing.uses(len(wanted)) if n > 1 else None
        foresee = None if self.following is None else lambda: self.following.foresee(n)
        for bundles in self._work.streamer.rounds(wanted, uses, n, foresee):
            self._ffn.run(
                bundles, routing.first.pointer, routing.tokens.pointer, routing.weights.pointer, n
            )

    def foresee(self, n: int) -> np.ndarray:
        """The bundles that the present state asks for, likeliest first, before this layer's turn.

        Its attention and the layer before will yet change the state. Source: bench/LOG.md.
        """
        s = self._work.scratch
        self._norm.run(s.x.pointer, n, s.ahead.pointer)
        self._foreseer.run(s.ahead.pointer, n)
        chosen = s.foreseen.choose(self._work, n)
        likely = s.foreseen.uses(len(chosen)) if n > 1 else s.foreseen.weights.array[: len(chosen)]
        return self._ids[chosen[np.argsort(-likely, kind="stable")]]
