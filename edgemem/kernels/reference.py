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
from ..spec import ModelSpec, RopeSpec

Watch = Callable[[int, str, np.ndarray], None]
"""Called with (layer, name, value) for each named intermediate of a forward pass."""


# ---- numbers: how a store's bytes become values ------------------------------------------------


def unpack(data, dtype: DType, rows: int, cols: int, lanes: int) -> np.ndarray:
    """The values of one packed matrix, float64 [rows, cols]. `data` holds its matrix_bytes."""
    raw = np.frombuffer(data, np.uint8)
    expected = dtypes.matrix_bytes(dtype, rows, cols, lanes)
    if raw.size != expected:
        raise ValueError(f"a {dtype.name} matrix of {rows}x{cols} has {expected} bytes: {raw.size}")
    groups = raw.reshape(-1, dtypes.group_bytes(dtype, cols, lanes))
    values = (_unpack_blocks if dtype.is_block else _unpack_floats)(groups, dtype, cols, lanes)
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])[:rows, :cols]


def _unpack_floats(groups: np.ndarray, dtype: DType, cols: int, lanes: int) -> np.ndarray:
    """[groups, cols, lanes]: a group holds column after column, `lanes` rows each."""
    raw = np.ascontiguousarray(groups)[:, : cols * lanes * dtype.quant_bytes]
    if dtype is dtypes.BF16:
        values = (raw.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.copy().view("<f2" if dtype is dtypes.F16 else "<f4")
    return values.astype(np.float64).reshape(len(groups), cols, lanes)


def _unpack_blocks(groups: np.ndarray, dtype: DType, cols: int, lanes: int) -> np.ndarray:
    """[groups, padded cols, lanes]: scale × quant, from the planes of both."""
    blocks = -(-cols // BLOCK)
    plane = dtypes.scale_plane_bytes(dtype, cols, lanes)
    scales = groups[:, : blocks * lanes * 2].copy().view("<f2").reshape(-1, blocks, 1, lanes)
    chunks = groups[:, plane : plane + blocks * lanes * dtype.quant_bytes]
    chunks = chunks.reshape(-1, blocks, dtype.quant_bytes // 4, lanes, 4)
    bytes_by_lane = chunks.transpose(0, 1, 2, 4, 3).reshape(-1, blocks, dtype.quant_bytes, lanes)
    if dtype is dtypes.Q8_0:
        quants = bytes_by_lane.astype(np.int16) - 128
    else:
        halves = np.concatenate([bytes_by_lane & 15, bytes_by_lane >> 4], axis=2)
        quants = halves.astype(np.int16) - 8
    return (scales.astype(np.float64) * quants).reshape(len(groups), blocks * BLOCK, lanes)


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


def frequencies(rope: RopeSpec, head_dim: int, max_positions: int, length: int) -> np.ndarray:
    """Radians per position for each pair of a head, float64 [head_dim // 2].

    `length` is how many positions the sequence has once the ids being fed are in: the "dynamic"
    type stretches its base when that exceeds `max_positions`; no other type looks at it.
    Definitions as in transformers' modeling_rope_utils.
    """
    theta = rope.theta
    if rope.type == "dynamic":
        stretch = rope.factor * max(length, max_positions) / max_positions - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return _llama3_frequencies(rope, plain)
    if rope.type == "yarn":
        return _yarn_frequencies(rope, plain, head_dim)
    return plain


def _llama3_frequencies(rope: RopeSpec, plain: np.ndarray) -> np.ndarray:
    """Long waves are stretched by factor, short ones kept, others interpolated (Llama 3.1)."""
    turns = rope.original_positions * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - blend) * plain / rope.factor + blend * plain
    scaled = np.where(turns < rope.low_freq_factor, plain / rope.factor, between)
    return np.where(turns > rope.high_freq_factor, plain, scaled)


def _yarn_frequencies(rope: RopeSpec, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """A ramp over the pairs from kept to stretched (Peng et al., arXiv 2309.00071)."""

    def pair_that_turns(count: float) -> float:
        wave = rope.original_positions / (count * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def rotate(x: np.ndarray, positions: np.ndarray, freqs: np.ndarray, scale: float) -> np.ndarray:
    """Rotary embedding of x [n, heads, D]: element i turns with i + D/2; both are times `scale`."""
    angles = positions[:, None, None] * freqs
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int = 0) -> np.ndarray:
    """Causal attention of the last n positions over all m: q [n, H, D], k and v [m, K, D].

    Head i reads key/value head i // (H // K). A query at position p sees positions j <= p and, with
    a window, j > p - window. Returns [n, H, D].
    """
    n, heads, head_dim = q.shape
    m, kv_heads, _ = k.shape
    k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
    scores = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(head_dim)
    here, there = np.arange(m - n, m)[:, None], np.arange(m)[None, :]
    visible = there <= here
    if window:
        visible &= there > here - window
    scores = np.where(visible, scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hnm,mhd->nhd", scores / scores.sum(axis=-1, keepdims=True), v)


def kept(x: np.ndarray, kv: str | None) -> np.ndarray:
    """What a KV cache of the type `kv` keeps of keys or values x [n, K, D], in float64.

    None is for a cache that rounds nothing; see kvcache.py for the others.
    """
    if kv == "q8_0":
        quants, scales = quantize_blocks(x.reshape(-1, x.shape[-1]))
        values = quants * scales.astype(np.float16)[..., None].astype(np.float64)
        return values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return x.astype({None: np.float64, "f32": np.float32, "f16": np.float16}[kv]).astype(np.float64)


def rounded_queries(q: np.ndarray) -> np.ndarray:
    """What keys of q8_0 are multiplied by for queries q [n, H, D]: q / sqrt(D) rounded to blocks,
    then times sqrt(D), in float64."""
    shrink = np.float32(1) / np.sqrt(np.float32(q.shape[-1]))
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


def ffn(x: np.ndarray, bundle: Mapping[str, np.ndarray], activation: str) -> np.ndarray:
    """down · (act(gate · x) * (up · x)), or without a gate down · act(up · x), with such biases as
    the bundle has; [n, h] → [n, h]."""
    h = linear(x, bundle["up"], bundle.get("up_bias"))
    if "gate" in bundle:
        h *= activate(activation, linear(x, bundle["gate"], bundle.get("gate_bias")))
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
        empty = np.zeros((0, spec.n_kv_heads, spec.head_dim))
        self._keys = [empty] * spec.n_layers
        self._values = [empty] * spec.n_layers

    @property
    def position(self) -> int:
        """How many ids have been fed."""
        return len(self._keys[0])

    def feed(self, ids) -> np.ndarray:
        """Append ids and return their logits, float64 [n, vocab]."""
        spec = self.spec
        x = self.weights.table()[np.asarray(ids, np.int64)].astype(np.float64)
        start = self.position
        positions = np.arange(start, start + len(x))
        freqs = frequencies(spec.rope, spec.head_dim, spec.max_positions, start + len(x))
        last = self.weights.dense(spec.n_layers)
        if spec.positions == "learned":
            freqs = np.zeros_like(freqs)
            x += last["positions"][positions]
        for layer in range(spec.n_layers):
            dense = self.weights.dense(layer)
            h = self._seen(layer, "attn_norm", self._norm(x, dense, "attn_norm"))
            mixed = self._attention(layer, dense, h, positions, freqs)
            before, x = x, x + self._seen(layer, "attention", mixed)
            if not spec.shared_norm:
                h = self._norm(before if spec.parallel else x, dense, "ffn_norm")
            h = self._seen(layer, "ffn_norm", h)
            x = x + self._seen(layer, "ffn", self._ffn(layer, dense, h))
        x = self._seen(spec.n_layers, "norm", self._norm(x, last, "norm"))
        return self._seen(spec.n_layers, "logits", linear(x, self.weights.head()))

    def _norm(self, x, dense, name: str) -> np.ndarray:
        if self.spec.norm == "rms":
            return rms_norm(x, dense[name], self.spec.norm_eps)
        return layer_norm(x, dense[name], dense[f"{name}_bias"], self.spec.norm_eps)

    def _seen(self, layer: int, name: str, value: np.ndarray) -> np.ndarray:
        self.watch(layer, name, value)
        return value

    def _attention(self, layer, dense, h, positions, freqs) -> np.ndarray:
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
        q = rotate(q, positions, freqs, self.spec.rope.attention_factor)
        k = rotate(k, positions, freqs, self.spec.rope.attention_factor)
        keys = self._keys[layer] = self._keep(self._keys[layer], k)
        values = self._values[layer] = self._keep(self._values[layer], v)
        q = rounded_queries(q) if self.kv == "q8_0" else q
        mixed = attend(q, keys, values, self.spec.windows[layer])
        self.watch(layer, "heads", mixed)
        return linear(mixed.reshape(len(h), -1), dense["o"], dense.get("o_bias"))

    def _keep(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.concatenate([old, kept(new, self.kv)])

    def _ffn(self, layer, dense, h) -> np.ndarray:
        if not self.spec.routed[layer]:
            return ffn(h, self.weights.ffn(layer), self.spec.activation)
        logits = self._seen(layer, "router", linear(h, dense["router"]))
        ids, weights = route(logits, self.spec.top_k, self.spec.normalize_top_k)
        out = np.zeros_like(h)
        for expert in np.unique(ids):
            tokens, slots = np.nonzero(ids == expert)
            bundle = self.weights.expert(layer, int(expert))
            y = ffn(h[tokens], bundle, self.spec.activation)
            out[tokens] += weights[tokens, slots, None] * y
        if self.spec.shared_intermediate:
            gate = _sigmoid(linear(h, dense["shared_gate"]))
            out += gate * ffn(h, self.weights.shared(layer), self.spec.activation)
        return out
