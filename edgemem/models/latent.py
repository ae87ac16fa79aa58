"""Attention whose heads make keys and values of one latent a token (arXiv 2405.04434).

What a head would make of every latent is made of its queries and of what they attend to instead, so
that a latent is kept as it is, once for all heads (section 2.1.2 there, reference.Forward).
"""

from __future__ import annotations

from .._native import lib
from ..kernels import Array, Linears, Ops, Tensors
from ..spec import LATENT_NORM_EPS
from .layers import Norm
from .workspace import Workspace


def add_latent_attention(work: Workspace, index: int, ops: Ops, tensors: Tensors) -> None:
    """attended = expand(attend(absorb(q(h)), rope(k(h)), norm(latent(h)))) with h = norm(x)."""
    spec, s = work.spec, work.scratch
    h, eps = s.h.pointer, LATENT_NORM_EPS
    Norm(ops, tensors, "attn_norm", spec.norm_eps, spec.hidden, s.x.pointer, h)
    q = ("q_down", "q_down_bias", s.narrow) if spec.q_rank else ("q", None, s.q)
    parts = [q, ("k", "k_bias", s.k), ("latent", "latent_bias", s.v)]
    Linears(tensors, parts).add_to(ops, h, _MAKING)
    if spec.q_rank:
        narrow = s.narrow.pointer
        Norm(ops, tensors, "q_down_norm", eps, spec.q_rank, narrow, narrow)
        Linears(tensors, [("q", None, s.q)]).add_to(ops, narrow, _MAKING)
    Norm(ops, tensors, "latent_norm", eps, spec.latent, s.v.pointer, s.v.pointer)
    dims, heads = spec.rope.dims, spec.n_heads
    add_heads(ops, tensors, "absorb", heads, s.q, s.absorbed, taken=dims)
    attend = ops.add(lib.EM_OP_ATTEND, "attending").attend
    attend.q, attend.k, attend.v = s.absorbed.pointer, s.k.pointer, s.v.pointer
    angles = s.angles[spec.rope_of(index)]
    attend.cos_table, attend.sin_table = angles.cos.pointer, angles.sin.pointer
    attend.out = s.absorbed.pointer
    add_heads(ops, tensors, "expand", heads, s.absorbed, s.attended)


_MAKING = "making queries, keys and latents"


def add_heads(
    ops: Ops, tensors: Tensors, name: str, n_heads: int, x: Array, out: Array, taken: int = 0
) -> None:
    """out = the first `taken` numbers of each head's x, and its rows of a matrix times the next."""
    op = ops.add(lib.EM_OP_HEADS, "multiplying head by head").heads
    segment = tensors.layout[name]
    op.weights, op.x, op.out = tensors.pointer(name, "void *"), x.pointer, out.pointer
    op.dtype, op.n_heads, op.taken = segment.dtype.code, n_heads, taken
    op.rows, op.cols = segment.rows // n_heads, segment.cols
    op.x_stride, op.out_stride = (array.array.shape[1] // n_heads for array in (x, out))
