"""The meaning of every operation, in plain numpy at float64: slow, short, the judge of the rest.

Nothing here is fast and nothing here is approximate. The native kernels are held to these functions
by `tests/property`, and these are held to transformers by `tests/parity`. Shapes: n tokens of a
step, m keys in the cache, H heads, K key/value heads, D head size, E experts, F neurons, h hidden.
A weight matrix is [outputs, inputs], as in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from .. import dtypes
from ..dtypes import BLOCK, DType
from ..format import NO_LAYER, Kind
from ..spec import LATENT_NORM_EPS, ModelSpec
from . import blocks
from .reference_rope import attention_factor, frequencies, rotate

Watch = Callable[[int, str, np.ndarray], None]
"""Called with (layer, name, value) for each named intermediate of a forward pass."""


# ---- numbers: how a store's bytes become values ------------------------------------------------


def unpack(data, dtype: DType, rows: int, cols: int, lanes: int) -> np.ndarray:
    """The values of one packed matrix, float64 [rows, cols], of which a float32 holds each. `data`
    has its matrix_bytes."""
    raw = np.frombuffer(data, np.uint8)
    expected = dtypes.matrix_bytes(dtype, rows, cols, lanes)
    if raw.size != expected:
        raise ValueError(f"a {dtype.name} matrix of {rows}x{cols} has {expected} bytes: {raw.size}")
    groups = raw.reshape(-1, dtypes.group_bytes(dtype, cols, lanes))
    values = (blocks.unpack if dtype.is_block else _unpack_floats)(groups, dtype, cols, lanes)
    values = values.astype(np.float64)
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])[:rows, :cols]


def _unpack_floats(groups: np.ndarray, dtype: DType, cols: int, lanes: int) -> np.ndarray:
    """[groups, cols, lanes]: a group holds column after column, `lanes` rows each."""
    raw = np.ascontiguousarray(groups)[:, : cols * lanes * dtype.quant_bytes]
    if dtype is dtypes.BF16:
        values = (raw.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.copy().view("<f2" if dtype is dtypes.F16 else "<f4")
    return values.reshape(len(groups), cols, lanes)


# ---- operations --------------------------------------------------------------------------------


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / rms(x) · weight over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / deviation · weight + bias over the last axis (arXiv 1607.06450)."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    return rms_norm(centred, weight, eps) + bias


def quantize_blocks(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What block formats multiply instead of x [n, cols]: (quants, scales) of blocks of 32.

    With peak = max |x| of a block, quants int8 [n, blocks, 32] = round(x · 127 / peak) to even and
    scales float32 [n, blocks] = peak / 127 rounded to 11 significant bits, all in float32; columns
    beyond `cols` are zero. These are llama.cpp's numbers: it keeps scales as float16, which has 11
    bits where it is normal. Here they have 11 everywhere, so that activations may have any size.
    """
    pad = -x.shape[1] % BLOCK
    blocks = np.pad(x.astype(np.float32), ((0, 0), (0, pad))).reshape(len(x), -1, BLOCK)
    peak = np.abs(blocks).max(axis=-1)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    fraction, exponent = np.frexp(peak / np.float32(127))
    scales = np.ldexp(np.rint(fraction * 2048), exponent - 11)
    return np.rint(blocks * inverse[..., None]).astype(np.int8), scales


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [n, inputs] times weight [outputs, inputs] transposed, plus bias [outputs]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int = 0, scale: float = 0.0,
    cap: float = 0.0, sinks: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Causal attention of the last n positions over all m: q [n, H, D], k [m, K, D], v [m, K, V].

    Head i reads key/value head i // (H // K). A query at position p sees positions j <= p and, with
    a window, j > p - window. Scores are times `scale` (0: 1 / sqrt(D)), then capped if there is a
    `cap`. Each head of `sinks` [H] has that score more, of a key without a value.
    Returns [n, H, V].
    """
    n, heads, head_dim = q.shape
    m, kv_heads, _ = k.shape
    k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
    scores = np.einsum("nhd,mhd->hnm", q, k) * (scale or 1 / math.sqrt(head_dim))
    scores = capped(scores, cap)
    here, there = np.arange(m - n, m)[:, None], np.arange(m)[None, :]
    visible = there <= here
    if window:
        visible &= there > here - window
    scores = np.where(visible, scores, -np.inf)
    sinks = np.full(heads, -np.inf) if sinks is None else sinks.reshape(heads)
    scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (heads, n, 1))], axis=-1)
    return np.einsum("hnm,mhd->nhd", softmax(scores)[..., :-1], v)


def capped(x: np.ndarray, cap: float) -> np.ndarray:
    """cap · tanh(x / cap); without a cap (0) x."""
    return cap * np.tanh(x / cap) if cap else x


def kept(x: np.ndarray, kv: str | None) -> np.ndarray:
    """What a KV cache of the type `kv` keeps of keys or values x [n, K, D], in float64.

    None is for a cache that rounds nothing; see kvcache.py for the others.
    """
    if kv == "q8_0":
        quants, scales = quantize_blocks(x.reshape(-1, x.shape[-1]))
        values = quants * scales.astype(np.float16)[..., None].astype(np.float64)
        return values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return x.astype({None: np.float64, "f32": np.float32, "f16": np.float16}[kv]).astype(np.float64)


def rounded_queries(q: np.ndarray, scale: float = 0.0) -> np.ndarray:
    """What keys of q8_0 are multiplied by for queries q [n, H, D]: q · scale (0: 1 / sqrt(D)),
    rounded to blocks, then divided by that scale, in float64."""
    shrink = np.float32(scale) or np.float32(1) / np.sqrt(np.float32(q.shape[-1]))
    quants, scales = quantize_blocks((q * shrink).reshape(-1, q.shape[-1]))
    values = quants * scales[..., None].astype(np.float64)
    return values.reshape(*q.shape[:-1], -1)[..., : q.shape[-1]] / np.float64(shrink)


def activate(name: str, x: np.ndarray) -> np.ndarray:
    """The activation `name` of spec.ACTIVATIONS, element by element."""
    return _ACTIVATIONS[name](x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


_ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def gated(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """act(gate) · up; "clamped_swiglu" is gelu_quick(min(gate, 7)) · (1 + up clamped to ±7), as in
    transformers' GptOssExperts."""
    if activation == "clamped_swiglu":
        return activate("gelu_quick", np.minimum(gate, 7)) * (1 + np.clip(up, -7, 7))
    return activate(activation, gate) * up


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def route(logits: np.ndarray, top_k: int, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Router logits [n, E] → (expert ids, weights), both [n, top_k], by falling weight.

    Softmax over all experts, then the k largest (of equals the lower id); `normalize` makes the k
    weights sum to one.
    """
    probabilities = softmax(logits)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probabilities, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if normalize else weights


def choice_scores(spec: ModelSpec, logits: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Router logits [n, E] → what the largest of are chosen, where scoring is not "sparsemixer".

    Groups of experts that are not among the best are left out: -inf. A group is as good as its best
    (DeepSeek-V2, arXiv 2405.04434), or where scores are sigmoids as the sum of its two best
    (DeepSeek-V3, arXiv 2412.19437).
    """
    softmax = spec.scoring == "softmax"
    scores = logits if softmax else _sigmoid(logits) + (0 if bias is None else bias)
    if spec.n_groups > 1:
        groups = scores.reshape(len(scores), spec.n_groups, -1)
        worth = np.sort(groups, axis=-1)[:, :, -1 if softmax else -2 :].sum(axis=-1)
        best = np.argsort(-worth, axis=-1, kind="stable")[:, : spec.top_groups]
        left_out = np.ones(worth.shape, bool)
        np.put_along_axis(left_out, best, False, axis=-1)
        scores = np.where(left_out[..., None], -np.inf, groups).reshape(scores.shape)
    return scores


def choose(spec: ModelSpec, logits: np.ndarray, bias: np.ndarray | None):
    """`route` by the rules of a spec; `bias` [E] is that of a router that has one."""
    if spec.scoring == "softmax" and spec.n_groups <= 1:
        ids, weights = route(logits, spec.top_k, spec.normalize_top_k)
        return ids, weights * spec.routed_scale
    if spec.scoring == "sparsemixer":
        return _mixed_sparsely(logits, spec.top_k, spec.router_jitter)
    chosen = np.argsort(-choice_scores(spec, logits, bias), axis=-1, kind="stable")
    ids = chosen[:, : spec.top_k]
    scores = softmax(logits) if spec.scoring == "softmax" else _sigmoid(logits)
    weights = np.take_along_axis(scores, ids, axis=-1)
    if spec.normalize_top_k:
        weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
    return ids, weights * spec.routed_scale


def _mixed_sparsely(logits: np.ndarray, top_k: int, jitter: float):
    """One by one the best logit that is left, and its share of a softmax over those that are close
    to it, by twice the jitter at most (arXiv 2409.12136)."""
    left, ids, weights = logits.copy(), [], []
    for _ in range(top_k):
        best = left.max(axis=-1, keepdims=True)
        far = (best - logits) / np.maximum(np.abs(logits), best) > 2 * jitter
        ids.append(left.argmax(axis=-1)[:, None])
        shares = softmax(np.where(far, -np.inf, left))
        weights.append(np.take_along_axis(shares, ids[-1], axis=-1))
        np.put_along_axis(left, ids[-1], -np.inf, axis=-1)
    return np.concatenate(ids, axis=-1), np.concatenate(weights, axis=-1)


def ffn(x: np.ndarray, bundle: Mapping[str, np.ndarray], activation: str) -> np.ndarray:
    """down · (act(gate · x) * (up · x)), or without a gate down · act(up · x), with such biases as
    the bundle has; [n, h] → [n, h]."""
    h = linear(x, bundle["up"], bundle.get("up_bias"))
    if "gate" in bundle:
        h = gated(activation, linear(x, bundle["gate"], bundle.get("gate_bias")), h)
    else:
        h = activate(activation, h)
    return linear(h, bundle["down"], bundle.get("down_bias"))


# ---- a model -----------------------------------------------------------------------------------


class Weights(Protocol):
    """Where a forward pass finds its weights: float arrays by segment name (FORMAT.md).

    `dense(n_layers)` holds the final norm, and learned positions. Vectors may be [n] or [1, n].
    """

    def table(self) -> np.ndarray:
        """The embedding, [vocab, h]."""

    def head(self) -> np.ndarray:
        """The output projection, [vocab, h]; the embedding itself in a tied model."""

    def dense(self, layer: int) -> Mapping[str, np.ndarray]:
        """Attention, norms and router of one layer."""

    def ffn(self, layer: int) -> Mapping[str, np.ndarray]:
        """The FFN of a layer that is not routed."""

    def expert(self, layer: int, index: int) -> Mapping[str, np.ndarray]:
        """One expert of a routed layer."""

    def shared(self, layer: int) -> Mapping[str, np.ndarray]:
        """The expert of a routed layer that every token passes."""


class StoreWeights:
    """The weights of an open store (`store.Store`), unpacked when asked for and then kept."""

    def __init__(self, store):
        self.store = store
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    def table(self) -> np.ndarray:
        """The embedding, or in a tied model the head."""
        return self._rows(Kind.EMBED) if len(self.store.find(Kind.EMBED)) else self.head()

    def head(self) -> np.ndarray:
        """The output projection."""
        return self._rows(Kind.HEAD)

    def dense(self, layer: int) -> Mapping[str, np.ndarray]:
        """The dense bundle of one layer."""
        return self.bundle(self.store.find(Kind.DENSE, layer)[0])

    def ffn(self, layer: int) -> Mapping[str, np.ndarray]:
        """The FFN bundle of one layer, put together where it is taken apart."""
        bundle = self.bundle(self.store.find(Kind.FFN, layer)[0])
        for neurons in self.store.find(Kind.NEURONS, layer):
            rows = self.bundle(neurons)["neurons"]
            places = self.store.places(int(neurons))
            rows = rows if places is None else rows[places]
            hidden = self.store.spec.hidden
            up = {"up": rows[:, -2 * hidden : -hidden]} if self.store.spec.gated else {}
            bundle = {**bundle, **up, "down": rows[:, -hidden:].T}
        return bundle

    def expert(self, layer: int, index: int) -> Mapping[str, np.ndarray]:
        """The bundle of one expert."""
        return self.bundle(self.store.find(Kind.EXPERT, layer)[index])

    def shared(self, layer: int) -> Mapping[str, np.ndarray]:
        """The bundle of one layer's shared expert."""
        return self.bundle(self.store.find(Kind.SHARED, layer)[0])

    def bundle(self, bundle_id: int) -> Mapping[str, np.ndarray]:
        """All segments of one bundle, float64, by name."""
        bundle_id = int(bundle_id)
        if bundle_id not in self._kept:
            layout = self.store.layout_of(bundle_id)
            data = bytearray(layout.payload_bytes)
            self.store.read(bundle_id, data)
            self._kept[bundle_id] = {
                s.name: unpack(data[s.offset : s.end], s.dtype, s.rows, s.cols, s.lanes)
                for s in layout.segments
                if s.dtype is not dtypes.U32
            }
        return self._kept[bundle_id]

    def _rows(self, kind: Kind) -> np.ndarray:
        ids = self.store.find(kind, NO_LAYER)
        return np.concatenate([self.bundle(i)["rows"] for i in ids])


def _by_head(spec: ModelSpec, matrix: np.ndarray) -> np.ndarray:
    """A matrix of which each head has its own rows, [H, rows, cols]."""
    return matrix.reshape(spec.n_heads, -1, matrix.shape[1])


class Forward:
    """A forward pass that remembers: feed ids, get the logits of each, feed more.

    `kv` is the type that keys and values are rounded to when they are kept, and queries with q8_0
    (kvcache.py); None (the default) is what a checkpoint means.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, kv: str | None = None, watch: Watch | None = None
    ):
        self.spec = spec
        self.weights = weights
        self.kv = kv
        self.watch = watch or (lambda layer, name, value: None)
        widths = (spec.rope.dims, spec.latent) if spec.latent else (spec.head_dim,) * 2
        self._keys, self._values = (
            [np.zeros((0, spec.n_kv_heads, width))] * spec.n_layers for width in widths
        )

    @property
    def position(self) -> int:
        """How many ids have been fed."""
        return len(self._keys[0])

    def feed(self, ids) -> np.ndarray:
        """Append ids and return their logits, float64 [n, vocab]."""
        spec = self.spec
        x = self.weights.table()[np.asarray(ids, np.int64)].astype(np.float64)
        start = self.position
        x *= spec.embedding_scale
        positions = np.arange(start, start + len(x))
        last = self.weights.dense(spec.n_layers)
        if spec.positions == "learned":
            x += last["positions"][positions]
        for layer in range(spec.n_layers):
            dense = self.weights.dense(layer)
            h = self._seen(layer, "attn_norm", self._norm(x, dense, "attn_norm"))
            mixed = self._added(self._attention(layer, dense, h, positions), dense, "attn")
            before, x = x, x + self._seen(layer, "attention", mixed)
            if not spec.shared_norm:
                h = self._norm(before if spec.parallel else x, dense, "ffn_norm")
            h = self._seen(layer, "ffn_norm", h)
            out = self._added(self._ffn(layer, dense, h), dense, "ffn")
            x = x + self._seen(layer, "ffn", out)
        x = self._seen(spec.n_layers, "norm", self._norm(x, last, "norm"))
        logits = linear(x, self.weights.head(), last.get("head_bias")) * spec.logit_scale
        return self._seen(spec.n_layers, "logits", capped(logits, spec.logit_cap))

    def _added(self, out: np.ndarray, dense, block: str) -> np.ndarray:
        """What a block that gives `out` adds to the residual stream."""
        if self.spec.post_norms:
            out = self._norm(out, dense, f"{block}_post_norm")
        return out * self.spec.residual_scale

    def _norm(self, x, dense, name: str) -> np.ndarray:
        if self.spec.norm == "rms":
            return rms_norm(x, dense[name], self.spec.norm_eps)
        return layer_norm(x, dense[name], dense[f"{name}_bias"], self.spec.norm_eps)

    def _seen(self, layer: int, name: str, value: np.ndarray) -> np.ndarray:
        self.watch(layer, name, value)
        return value

    def _attention(self, layer, dense, h, positions) -> np.ndarray:
        spec = self.spec
        made = (self._latent_heads if spec.latent else self._heads)(layer, dense, h, positions)
        q, k, v = made
        keys = self._keys[layer] = self._keep(self._keys[layer], k)
        values = self._values[layer] = self._keep(self._values[layer], v)
        if spec.latent:
            keys = np.concatenate([keys, values], axis=-1)
        scale = spec.attention_scale or 1 / math.sqrt(spec.head_dim)
        if self.kv == "q8_0":
            dims = spec.rope.dims if spec.latent else spec.head_dim  # latents are read as floats
            q = np.concatenate([rounded_queries(q[..., :dims], scale), q[..., dims:]], axis=-1)
        window, sinks = spec.windows[layer], dense.get("sinks")
        mixed = attend(q, keys, values, window, scale, spec.attention_cap, sinks)
        if spec.latent:
            mixed = np.einsum("nhr,hvr->nhv", mixed, _by_head(spec, dense["expand"]))
        self.watch(layer, "heads", mixed)
        return linear(mixed.reshape(len(h), -1), dense["o"], dense.get("o_bias"))

    def _heads(self, layer, dense, h, positions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries [n, H, D], keys and values [n, K, D]."""
        q, k, v = (linear(h, dense[name], dense.get(f"{name}_bias")) for name in "qkv")
        if self.spec.qk_norm == "full":
            q = rms_norm(q, dense["q_norm"], self.spec.norm_eps)
            k = rms_norm(k, dense["k_norm"], self.spec.norm_eps)
        if self.spec.clip_qkv:
            q, k, v = (np.clip(t, -self.spec.clip_qkv, self.spec.clip_qkv) for t in (q, k, v))
        q, k, v = (t.reshape(len(h), -1, self.spec.head_dim) for t in (q, k, v))
        if self.spec.qk_norm == "head":
            q = rms_norm(q, dense["q_norm"], self.spec.norm_eps)
            k = rms_norm(k, dense["k_norm"], self.spec.norm_eps)
        q, k = (self._rotated(t, layer, positions) for t in (q, k))
        return q, k, v

    def _latent_heads(self, layer, dense, h, positions):
        """Queries [n, H, R + L], what is rotated of keys [n, 1, R], and latents [n, 1, L], which
        are values, and the rest of keys. What a head would make of latents is made of its queries:
        q · (A c) is (q A) · c (arXiv 2405.04434, section 2.1.2)."""
        spec, dims = self.spec, self.spec.rope.dims
        narrow = h
        if spec.q_rank:
            narrow = linear(h, dense["q_down"], dense.get("q_down_bias"))
            narrow = rms_norm(narrow, dense["q_down_norm"], LATENT_NORM_EPS)
        q = linear(narrow, dense["q"]).reshape(len(h), spec.n_heads, spec.head_dim)
        absorbed = np.einsum("nhd,hrd->nhr", q[:, :, dims:], _by_head(spec, dense["absorb"]))
        k = linear(h, dense["k"], dense.get("k_bias"))[:, None]
        latent = linear(h, dense["latent"], dense.get("latent_bias"))[:, None]
        latent = rms_norm(latent, dense["latent_norm"], LATENT_NORM_EPS)
        q, k = (self._rotated(t, layer, positions) for t in (q[:, :, :dims], k))
        return np.concatenate([q, absorbed], axis=-1), k, latent

    def _rotated(self, x: np.ndarray, layer: int, positions: np.ndarray) -> np.ndarray:
        spec, length = self.spec, int(positions[-1]) + 1
        if spec.positions == "learned":
            return x
        rope = spec.ropes[spec.rope_of(layer)]
        freqs = frequencies(rope, spec.head_dim, spec.max_positions, length)
        return rotate(x, positions, freqs, attention_factor(rope, length))

    def _keep(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.concatenate([old, kept(new, self.kv)])

    def _ffn(self, layer, dense, h) -> np.ndarray:
        if not self.spec.routed[layer]:
            return ffn(h, self.weights.ffn(layer), self.spec.activation)
        logits = linear(h, dense["router"], dense.get("router_logit_bias"))
        self.watch(layer, "router", logits)
        ids, weights = choose(self.spec, logits, dense.get("router_bias"))
        out = np.zeros_like(h)
        for expert in np.unique(ids):
            tokens, slots = np.nonzero(ids == expert)
            bundle = self.weights.expert(layer, int(expert))
            y = ffn(h[tokens], bundle, self.spec.activation)
            out[tokens] += weights[tokens, slots, None] * y
        if self.spec.shared_intermediate:
            gated = self.spec.shared_gated
            gate = _sigmoid(linear(h, dense["shared_gate"])) if gated else 1.0
            out += gate * ffn(h, self.weights.shared(layer), self.spec.activation)
        return out
