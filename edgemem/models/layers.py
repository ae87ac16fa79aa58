"""The parts that layers are made of.

Activations live in one `Scratch` that all parts share. A part adds its operations on it to its
layer's `Ops`, which one native call runs up to the feed-forward parts, which may have to wait for
bundles. It knows where its tensors lie inside a bundle (from the bundle's layout) and is told where
the bundle is each time that changes.
"""

from __future__ import annotations

import numpy as np

from .._native import check, ffi, lib, pointer
from ..format import Kind
from ..kernels import ACTIVATION_CODES, Array, Linears, Ops
from .workspace import Workspace


class Norm:
    """RMSNorm of `rows` rows of `cols` floats for each token (arXiv 1910.07467)."""

    def __init__(self, ops: Ops, layout, name: str, eps: float, cols: int, x, out, rows: int = 1):
        self._offset = layout[name].offset
        self._op = op = ops.add(lib.EM_OP_NORM, "normalising").norm
        op.x, op.out, op.eps, op.rows, op.cols = x, out, eps, rows, cols

    def bind(self, address: int) -> None:
        self._op.weight = ffi.cast("float *", address + self._offset)

    def read(self, x) -> None:
        """x: float pointer to the rows that the next run norms."""
        self._op.x = x


class Attention:
    """x += o(attend(rope(norm(q(h))), …)) with h = norm(x): grouped queries."""

    def __init__(self, work: Workspace, ops: Ops, layout):
        spec, core, s = work.spec, work.core, work.scratch
        x, h = s.x.pointer, s.h.pointer
        norm = Norm(ops, layout, "attn_norm", spec.norm_eps, spec.hidden, x, h)
        qkv = Linears(
            core, layout,
            [("q", "q_bias", s.q, 0), ("k", "k_bias", s.k, 0), ("v", "v_bias", s.v, 0)],
        )  # fmt: skip
        qkv.add_to(ops, h, "making queries, keys and values")
        self._parts = [norm, qkv]
        for name, heads, array in (("q_norm", spec.n_heads, s.q), ("k_norm", spec.n_kv_heads, s.k)):
            if spec.qk_norm == "none":
                continue
            full = spec.qk_norm == "full"
            rows, cols = (1, heads * spec.head_dim) if full else (heads, spec.head_dim)
            at = array.pointer
            self._parts.append(Norm(ops, layout, name, spec.norm_eps, cols, at, at, rows))
        for array in (s.q, s.k, s.v) if spec.clip_qkv else ():
            clamp = ops.add(lib.EM_OP_CLAMP, "clipping q, k, v").elements
            clamp.x, clamp.cols, clamp.limit = array.pointer, array.array.shape[1], spec.clip_qkv
        attend = ops.add(lib.EM_OP_ATTEND, "attending").attend
        attend.q, attend.k, attend.v = s.q.pointer, s.k.pointer, s.v.pointer
        attend.cos_table, attend.sin_table = s.cos.pointer, s.sin.pointer
        attend.out = s.attended.pointer
        out = Linears(core, layout, [("o", "o_bias", s.x, 0)], accumulate=True)
        out.add_to(ops, s.attended.pointer, "adding what was attended to")
        self._parts.append(out)

    def bind(self, address: int) -> None:
        for part in self._parts:
            part.bind(address)


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

    def __init__(self, work: Workspace, index: int, ops: Ops, dense_layout):
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

    def __init__(self, work: Workspace, index: int, ops: Ops, dense_layout):
        super().__init__(work, index, ops, dense_layout)
        gate = Linears(work.core, dense_layout, [("shared_gate", None, self._weights, 0)])
        gate.add_to(ops, work.scratch.h.pointer, "gating the shared expert")
        sigmoid = ops.add(lib.EM_OP_SIGMOID, "gating the shared expert").elements
        sigmoid.x, sigmoid.cols = self._weights.pointer, 1
        self.bind = gate.bind


class Experts:
    """A mixture of experts: each token takes its top k, weighted by the router's softmax.

    `following` is the next layer's, if that is routed too: it foresees what it will want.
    """

    following: Experts | None = None

    def __init__(self, work: Workspace, index: int, ops: Ops, dense_layout):
        spec, s = work.spec, work.scratch
        self._work = work
        self._ids, layouts = work.bundles(Kind.EXPERT, index)
        self._ffn = GatedFfn(work, layouts[0], spec.expert_intermediate)
        router = s.routing.add_to(ops, work, dense_layout, s.h)
        # The same once more, on what the state will be by this layer's turn, or nearly.
        self._foresee = foresee = Ops(work.core)
        x, ahead = s.x.pointer, s.ahead.pointer
        norm = Norm(foresee, dense_layout, "ffn_norm", spec.norm_eps, spec.hidden, x, ahead)
        self._parts = [router, norm, s.foreseen.add_to(foresee, work, dense_layout, s.ahead)]

    def bind(self, address: int) -> None:
        for part in self._parts:
            part.bind(address)

    def run(self, n: int) -> None:
        routing = self._work.scratch.routing
        chosen = routing.chosen
        uses = routing.uses(len(chosen)) if n > 1 else None
        foresee = None if self.following is None else lambda: self.following.foresee(n)
        for bundles in self._work.streamer.rounds(self._ids[chosen], uses, n, foresee):
            self._ffn.run(
                bundles, routing.first.pointer, routing.tokens.pointer, routing.weights.pointer, n
            )

    def foresee(self, n: int) -> np.ndarray:
        """The bundles that the present state asks for, likeliest first, before this layer's turn.

        Its attention and the layer before will yet change the state. Source: bench/LOG.md.
        """
        self._foresee.run(n)
        foreseen = self._work.scratch.foreseen
        chosen = foreseen.chosen
        likely = foreseen.uses(len(chosen)) if n > 1 else foreseen.weights.array[: len(chosen)]
        return self._ids[chosen[np.argsort(-likely, kind="stable")]]
