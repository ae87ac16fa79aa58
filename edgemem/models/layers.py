"""The parts that layers are made of.

Activations live in one `Scratch` that all parts share. A part adds its operations on it to its
layer's `Ops`, which one native call runs. It knows where its tensors lie inside the layer's dense
bundle (from that bundle's layout and address); other bundles come and go, and a stream hands them
to the operations that take them.
"""

from __future__ import annotations

import numpy as np

from .._native import ffi, lib, pointer
from ..format import Kind, Layout, neuron_parts
from ..kernels import ACTIVATION_CODES, Array, Linears, Ops, Tensors
from .workspace import Workspace


class Norm:
    """A norm of `rows` rows of `cols` floats for each token: LayerNorm (arXiv 1607.06450) where
    `name` has a bias, else RMSNorm (arXiv 1910.07467)."""

    def __init__(
        self, ops: Ops, tensors: Tensors, name: str, eps: float, cols: int, x, out, rows: int = 1
    ):
        self._op = op = ops.add(lib.EM_OP_NORM, "normalising").norm
        op.weight = tensors.pointer(name, "float *")
        if f"{name}_bias" in tensors:
            op.bias = tensors.pointer(f"{name}_bias", "float *")
        op.x, op.out, op.eps, op.rows, op.cols = x, out, eps, rows, cols

    def read(self, x) -> None:
        """x: float pointer to the rows that the next run norms."""
        self._op.x = x


class Block:
    """What goes into the residual stream x: of attention, or of the feed-forward parts together.

    Parts add what they give to `out` between `open` and `close`. That is x itself where nothing is
    done to it; else it is cleared first, and then x += residual_scale · norm(out), the norm being
    there or not.
    """

    def __init__(self, work: Workspace, ops: Ops, tensors: Tensors, norm: str):
        self._work, self._ops, self._tensors, self._norm = work, ops, tensors, norm
        self.out = work.scratch.block

    def open(self) -> None:
        """Add what comes before the parts."""
        if not self._work.spec.plain_residual:
            clear = self._ops.add(lib.EM_OP_CLEAR, "adding to the residual stream").elements
            clear.x, clear.cols = self.out.pointer, self._work.spec.hidden

    def close(self) -> None:
        """Add what comes after the parts."""
        spec, ops, out = self._work.spec, self._ops, self.out.pointer
        if spec.plain_residual:
            return
        if spec.post_norms:
            Norm(ops, self._tensors, self._norm, spec.norm_eps, spec.hidden, out, out)
        add = ops.add(lib.EM_OP_ADD, "adding to the residual stream").elements
        add.x, add.y, add.cols = self._work.scratch.x.pointer, out, spec.hidden
        add.factor = spec.residual_scale


def add_attention(work: Workspace, index: int, ops: Ops, tensors: Tensors) -> None:
    """attended = attend(rope(norm(q(h))), …) with h = norm(x): grouped queries."""
    spec, s = work.spec, work.scratch
    x, h = s.x.pointer, s.h.pointer
    Norm(ops, tensors, "attn_norm", spec.norm_eps, spec.hidden, x, h)
    qkv = Linears(tensors, [("q", "q_bias", s.q), ("k", "k_bias", s.k), ("v", "v_bias", s.v)])
    qkv.add_to(ops, h, "making queries, keys and values")
    for name, heads, array in (("q_norm", spec.n_heads, s.q), ("k_norm", spec.n_kv_heads, s.k)):
        if spec.qk_norm == "none":
            continue
        full = spec.qk_norm == "full"
        rows, cols = (1, heads * spec.head_dim) if full else (heads, spec.head_dim)
        Norm(ops, tensors, name, spec.norm_eps, cols, array.pointer, array.pointer, rows)
    for array in (s.q, s.k, s.v) if spec.clip_qkv else ():
        clamp = ops.add(lib.EM_OP_CLAMP, "clipping q, k, v").elements
        clamp.x, clamp.cols, clamp.limit = array.pointer, array.array.shape[1], spec.clip_qkv
    attend = ops.add(lib.EM_OP_ATTEND, "attending").attend
    attend.q, attend.k, attend.v = s.q.pointer, s.k.pointer, s.v.pointer
    angles = s.angles[spec.rope_of(index)]
    attend.cos_table, attend.sin_table = angles.cos.pointer, angles.sin.pointer
    if spec.sinks:
        attend.sinks = tensors.pointer("sinks", "float *")
    attend.out = s.attended.pointer


def add_attended(work: Workspace, ops: Ops, tensors: Tensors) -> None:
    """x += o(attended)."""
    block = Block(work, ops, tensors, "attn_post_norm")
    block.open()
    out = Linears(tensors, [("o", "o_bias", block.out)], accumulate=True)
    out.add_to(ops, work.scratch.attended.pointer, "adding what was attended to")
    block.close()


class Ffn:
    """x += down(act(gate(h)) * up(h)) over bundles of one layout (arXiv 2002.05202), or without a
    gate x += down(act(up(h))).

    `bundles` uint32: the experts', or the one that all tokens take. `op` is the em_ffn_op.
    """

    def __init__(
        self, work: Workspace, ops: Ops, layout: Layout, bundles: np.ndarray, intermediate: int
    ):
        def at(name: str) -> int:
            return layout[name].offset if name in layout else -1

        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        self._ffn = ffi.new("em_ffn *", {
            **{name: at(name) for name in names},
            **{f"{n}_dtype": layout[n].dtype.code for n in names[:3] if n in layout},
            "hidden": work.spec.hidden, "intermediate": intermediate,
            "activation": ACTIVATION_CODES[work.spec.activation],
        })  # fmt: skip
        self._bundles = pointer(bundles, "uint32_t *")
        self.op = op = ops.add(lib.EM_OP_FFN, "computing a feed-forward network").ffn
        op.stream, op.ffn, op.bundles = work.streamer.stream, self._ffn, self._bundles
        op.x, op.out = work.scratch.h.pointer, work.scratch.block.pointer
        ops.keep(self)


class Dense:
    """A feed-forward network that every token takes: one bundle, weight 1 for each token."""

    kind = Kind.FFN

    def __init__(self, work: Workspace, index: int, ops: Ops, tensors: Tensors):
        spec = work.spec
        bundles, layouts = work.bundles(self.kind, index)
        shared = self.kind == Kind.SHARED
        width = spec.shared_intermediate if shared else spec.intermediate
        n_tokens = len(work.scratch.x.array)
        self._tokens, self._weights = Array(n_tokens, np.int32), Array(n_tokens)
        self._tokens.array[:] = np.arange(n_tokens)
        self._weights.array[:] = 1.0
        self._add_gate(ops, work, tensors)
        op = Ffn(work, ops, layouts[0], bundles, width).op
        op.tokens, op.weights = self._tokens.pointer, self._weights.pointer

    def _add_gate(self, ops: Ops, work: Workspace, tensors: Tensors) -> None:
        """What makes weights: here they are 1."""


class Neurons:
    """A feed-forward network that is taken apart: what decides which neurons are active is
    multiplied by whole, and of the others only those are used (arXiv 2312.11514, exactly). Or it is
    foretold, and no matrix is multiplied by whole (section 3.1 there)."""

    def __init__(self, work: Workspace, index: int, ops: Ops, tensors: Tensors):
        spec, s = work.spec, work.scratch
        bundles, (layout,) = work.bundles(Kind.PREDICTOR if work.predicts else Kind.FFN, index)
        (rows,), (apart,) = work.bundles(Kind.NEURONS, index)

        def at(name: str) -> int:
            return layout[name].offset if name in layout else -1

        decides = "gate" if spec.gated else "up"
        self._neurons = ffi.new("em_neurons *", {
            "deciding": at(decides), "deciding_bias": at(f"{decides}_bias"),
            "up_bias": at("up_bias") if spec.gated else -1, "down_bias": at("down_bias"),
            **{name: at(name) for name in ("reduce", "score", "score_bias")},
            "rank": spec.ranks[index] if work.predicts else 0,
            f"{'predictor' if work.predicts else 'deciding'}_dtype": layout.segments[0].dtype.code,
            "dtype": apart["neurons"].dtype.code, "row_parts": neuron_parts(spec),
            "gated": spec.gated, "hidden": spec.hidden, "intermediate": spec.intermediate,
            "activation": ACTIVATION_CODES[spec.activation],
        })  # fmt: skip
        self._bundles = pointer(bundles, "uint32_t *")
        op = ops.add(lib.EM_OP_NEURONS, "computing a feed-forward network").neurons
        op.stream, op.neurons, op.bundles = work.streamer.stream, self._neurons, self._bundles
        work.find_neurons(int(rows), op.rows)
        op.x, op.out = s.h.pointer, s.block.pointer
        ops.keep(self)

    def rest(self, threshold: float) -> None:
        """Let neurons of up to that magnitude rest from now on; 0 is exact."""
        self._neurons.threshold = threshold


class SharedExpert(Dense):
    """An expert that every token takes, weighted by the sigmoid of its own gate if it has one."""

    kind = Kind.SHARED

    def _add_gate(self, ops: Ops, work: Workspace, tensors: Tensors) -> None:
        if not work.spec.shared_gated:
            return
        gate = Linears(tensors, [("shared_gate", None, self._weights)])
        gate.add_to(ops, work.scratch.h.pointer, "gating the shared expert")
        sigmoid = ops.add(lib.EM_OP_SIGMOID, "gating the shared expert").elements
        sigmoid.x, sigmoid.cols = self._weights.pointer, 1


class Experts:
    """A mixture of experts: each token takes its top k, weighted by what the router scores."""

    def __init__(self, work: Workspace, index: int, ops: Ops, tensors: Tensors):
        spec, s = work.spec, work.scratch
        self._work, self._tensors = work, tensors
        self._bundles, layouts = work.bundles(Kind.EXPERT, index)
        routing = s.routing.add_to(ops, spec, tensors, s.h)
        ffn = Ffn(work, ops, layouts[0], self._bundles, spec.expert_intermediate)
        self._op = op = ffn.op
        op.routing = routing
        op.tokens, op.weights = s.routing.tokens.pointer, s.routing.weights.pointer

    def foresee(self, following: Experts) -> None:
        """Let this part foresee which bundles the next layer's will want, and what that foresees.

        That layer's router is asked once more, before its turn, about the present state, which its
        attention and this part will yet change. Source: bench/LOG.md.
        """
        spec, s = self._work.spec, self._work.scratch
        self._ops = ops = Ops(self._work.core)
        x, ahead = s.x.pointer, s.ahead.pointer
        Norm(ops, following._tensors, "ffn_norm", spec.norm_eps, spec.hidden, x, ahead)
        foresight = self._op.foresight
        foresight.routing = s.foreseen.add_to(ops, spec, following._tensors, s.ahead)
        foresight.bundles = pointer(following._bundles, "uint32_t *")
        foresight.next = ffi.addressof(following._op.foresight)
        ops.lend(foresight)
