"""Random weights that behave like trained ones where it matters for speed, made from raw bits.

Random weights route almost uniformly and let a constant direction take over the residual stream;
no real model does. Three things prevent it: weights have a mean of exactly zero; output
projections (o, down) are scaled so that each of them adds a few per cent to the stream; and all
token embeddings share one common vector, so that each router has a static preference (popular
experts), around which tokens vary. `bench/routing.py` holds the outcome to the routing of a real
model. Where an FFN without a gate has ReLU, biases leave as few neurons active as real ones have:
by that same common vector a few of them often, most of them hardly ever; and what decides has most
of its variance in few directions, so that thin predictors can tell, as they can of real models.

Values are drawn in the number format and the order in which a store holds them, a tile of some rows
at a time, each from its own seed, so any tile can be made on its own, and every form of a
checkpoint (store, folder, GGUF) holds the same values.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import floor, log2, sqrt
from statistics import NormalDist

import numpy as np

from edgemem.converters.configuration import Description
from edgemem.converters.neurons import taken_apart
from edgemem.converters.quantize import pack
from edgemem.dtypes import (
    BF16,
    BLOCK,
    F16,
    F32,
    LANES,
    MXFP4,
    Q4_0,
    Q8_0,
    U32,
    DType,
    group_bytes,
    scale_plane_bytes,
)
from edgemem.format import NO_LAYER, Kind, Layout, Segment, bundle_order, bundle_parts, table_rows
from edgemem.spec import GATES, ModelSpec

COMMON = 1.54
"""Length of the vector that all embeddings share, where their noise has length 1."""
ADDED = 0.05
"""What one attention or FFN adds to the residual stream, as a share of it."""
ROUTER_SPREAD = 1.0
"""Standard deviation of router logits."""
TIED_LOGITS = 3.0
"""Standard deviation of logits where the head is the embedding, by the weight of the last norm."""

THRESHOLD = 1.88
"""What ReLU asks of a neuron's input, which has a deviation of 1: 97 % of them are less, as in
OPT-6.7B (arXiv 2312.11514)."""

DIRECTIONS, FORETOLD = 64, 0.9
"""Of what decides which neurons are active, so many directions have that share of the variance."""

WEIGHTS = {"q4_0": Q4_0, "q8_0": Q8_0, "bf16": BF16, "f16": F16}
TABLES = {"q4_0": Q8_0, "q8_0": Q8_0, "bf16": BF16, "f16": F16}
"""Formats of matrices and of vocabulary tables, as `edgemem convert` chooses them."""
KEPT = ("router", "shared_gate")
"""Always bf16: they decide what is computed."""
EXPERTS = {"gpt_oss": MXFP4}
"""Formats of experts of models that are published in them."""

_WORKERS = min(4, os.cpu_count() or 1)
_TILE_BYTES = 512 << 10
_CACHED_WORDS = 1 << 13
"""What is masked at a time, so that it stays in a core's cache."""

_NAMES = (
    "rows", "q", "k", "v", "o", "gate", "up", "down", "router", "shared_gate", "q_bias", "k_bias",
    "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias", "attn_norm_bias", "ffn_norm_bias",
    "norm_bias", "positions", "neurons", "q_down", "latent", "absorb", "expand", "sinks",
    "router_logit_bias", "router_bias", "head_bias",
)  # fmt: skip
"""A segment's place here is part of its seed."""

_Q4_STD = sqrt(17.5)  # of nibbles 1 … 15 around 8, where 0 counts as 8
_E2M1_STD = sqrt(274 / 8)  # of 0, 1, 2, 3, 4, 6, 8, 12 and their negatives
_Q8_STD = sqrt(127 * 128 * 255 / 3 / 256)  # of −127 … 127, where −128 counts as 0
_TABLE_Q8_STD = sqrt(2 * (64**2 - 1) / 12)  # of the sum of two evenly spread 6-bit numbers


@dataclass(frozen=True)
class Tile:
    """Some whole groups of rows of one segment."""

    key: tuple[int, ...]
    segment: Segment
    std: float
    common: bool
    first_row: int
    rows: int


class Weights:
    """All weights of one synthetic model, by bundle, in one number format."""

    def __init__(self, description: Description, seed: int, dtype: str, neurons: bool = False):
        self.spec = taken_apart(description.spec) if neurons else description.spec
        if neurons and self.spec.gated:
            raise ValueError("neurons can be drawn for FFNs without a gate only")
        self.dtype = dtype
        self._biases = description.biases
        self._seed = seed
        self._layouts: dict[tuple, Layout] = {}
        if WEIGHTS[dtype].is_block:
            _check_columns(description.spec)
        random = np.random.default_rng([seed, *b"common"])
        self._signs = random.integers(0, 2, self.spec.hidden, np.int16) * 2 - 1

    @property
    def _sparse(self) -> bool:
        spec = self.spec
        return not spec.gated and spec.activation == "relu" and "up_bias" in self._biases

    def bundles(self) -> Iterator[tuple[Kind, int, int, Layout]]:
        """Kind, layer, index and layout of every bundle, in the order of a store."""
        spec = self.spec
        if not spec.tied:
            yield from self._table(Kind.EMBED)
        for kind, layer, index in bundle_order(spec, range(spec.n_layers + 1)):
            yield kind, layer, index, self.layout(kind, layer)
        yield from self._table(Kind.HEAD)

    def layout(self, kind: Kind, layer: int) -> Layout:
        """The segments of a layer's bundles of one kind."""
        last = layer == self.spec.n_layers
        key = kind, last, last or self.spec.routed[layer]
        if key not in self._layouts:
            self._layouts[key] = Layout.build(
                (part.name, self._format(kind, part), part.lanes, part.rows, part.cols)
                for part in bundle_parts(self.spec, kind, layer)
                if not part.optional or part.name in self._biases
            )
        return self._layouts[key]

    def tiles(self, kind: Kind, layer: int, index: int, segment: Segment) -> list[Tile]:
        """A segment of a bundle, cut to be drawn piece by piece."""
        code = _NAMES.index(segment.name) if segment.name in _NAMES else len(_NAMES)
        key = (self._seed, kind, layer, index, code)
        common = kind == Kind.EMBED or (kind == Kind.HEAD and self.spec.tied)
        group = group_bytes(segment.dtype, segment.cols, segment.lanes)
        step = max(1, _TILE_BYTES // group) * segment.lanes
        if segment.dtype == U32:
            return []  # they are made of what was written before them
        std = self._std(kind, layer, segment)
        return [
            Tile((*key, first), segment, std, common, first, min(step, segment.rows - first))
            for first in range(0, segment.rows, step)
        ]

    def draw(self, tile: Tile) -> np.ndarray:
        """The bytes of a tile as a store holds them, uint8 [groups, group_bytes]."""
        segment = tile.segment
        if segment.lanes == 1 and segment.name not in ("rows", "neurons"):
            return self._vector(tile).view(np.uint8)
        bits = np.random.SFC64(np.random.SeedSequence(tile.key))
        groups = -(-tile.rows // segment.lanes)
        if segment.name == "up" and self._sparse:
            return self._deciding(tile, bits)
        if segment.dtype.is_block:
            out = self._blocks(tile, bits, groups)
        else:
            out = self._floats(tile, bits, groups)
        _clear_padding(out, tile)
        return out

    def _table(self, kind: Kind) -> Iterator[tuple[Kind, int, int, Layout]]:
        dtype, vocab, cols = TABLES[self.dtype], self.spec.vocab_size, self.spec.hidden
        step, lanes = table_rows(kind, dtype, cols), 1 if kind == Kind.EMBED else LANES
        for index, first in enumerate(range(0, vocab, step)):
            rows = min(step, vocab - first)
            yield kind, NO_LAYER, index, Layout.build([("rows", dtype, lanes, rows, cols)])

    def _format(self, kind: Kind, part) -> DType:
        if part.dtype is not None:
            return part.dtype
        if kind == Kind.EXPERT and self.spec.model_type in EXPERTS:
            return EXPERTS[self.spec.model_type]
        return BF16 if part.name in KEPT else WEIGHTS[self.dtype]

    def _std(self, kind: Kind, layer: int, segment: Segment) -> float:
        """The standard deviation of a segment's weights (of their noise, for embeddings)."""
        spec, name = self.spec, segment.name
        stream = sqrt(1 + COMMON**2)
        if name == "rows":
            embeds = kind == Kind.EMBED or spec.tied
            return 1 / spec.embedding_scale if embeds else 1 / sqrt(spec.hidden)
        if name == "o":
            return ADDED * stream / (0.8 * sqrt(segment.cols))  # mixed values: length about 0.8
        if name in ("down", "neurons"):
            experts = sqrt(spec.top_k) if kind == Kind.EXPERT else 1.0
            shares = self._shares() if kind == Kind.EXPERT else 1.0
            length = 0.09 if self._sparse else 0.6 * shares  # of max(0, u − THRESHOLD); silu(g)·u
            if spec.activation in GATES:
                length = 0.9  # of gelu_quick(g)·(1 + u)
            width = spec.intermediate if name == "neurons" else segment.cols
            return ADDED * stream * experts / (length * sqrt(width))
        if name in KEPT:
            return ROUTER_SPREAD / sqrt(segment.cols)
        if name in ("positions", "sinks"):
            return {"positions": 0.1, "sinks": 1.0}[name]
        if name == "absorb":  # a part of a matrix of latents, turned around
            return 1 / sqrt(spec.latent)
        return 0.1 if name.endswith("bias") else 1 / sqrt(segment.cols)

    def _shares(self) -> float:
        """About what the weights of a token's experts add up to."""
        spec = self.spec
        if spec.scoring == "sparsemixer":
            return 2.0 * 0.8  # each is nearly the only one of those that come close
        return spec.routed_scale * (1.0 if spec.normalize_top_k else 0.4)

    def _vector(self, tile: Tile) -> np.ndarray:
        """A norm's weight or a bias: f32 that bf16 holds exactly."""
        segment = tile.segment
        if segment.name.endswith("bias") or segment.name in ("positions", "sinks"):
            mean = -THRESHOLD if segment.name == "up_bias" and self._sparse else 0.0
            index = np.random.default_rng(tile.key).integers(0, 256, (tile.rows, segment.cols))
            return _normal_bf16(tile.std, mean)[index].astype(np.uint32) << 16
        value = 1.0
        if segment.name == "norm" and self.spec.tied:
            value = TIED_LOGITS * self.spec.embedding_scale / sqrt(segment.cols)
        if segment.name in ("attn_post_norm", "ffn_post_norm"):
            value = ADDED * sqrt(1 + COMMON**2)  # of a block's output, whatever its length was
        values = np.full((1, segment.cols), value, np.float32)
        if segment.name == "norm" and self.spec.tied and self.spec.logit_cap:
            values[:, 1::2] *= -1  # else what all embeddings share would drive all to the cap
        return values.view(np.uint32) & np.uint32(0xFFFF0000)

    def _floats(self, tile: Tile, bits: np.random.SFC64, groups: int) -> np.ndarray:
        """Each weight is one of 256 quantiles of the normal distribution, times its deviation."""
        segment = tile.segment
        out = np.zeros((groups, group_bytes(segment.dtype, segment.cols, segment.lanes)), np.uint8)
        table = _normal_f16 if segment.dtype == F16 else _normal_bf16
        picks = _random_bytes(bits, groups * segment.cols * segment.lanes)
        shape = (groups, segment.cols, segment.lanes)
        values = out[:, : segment.cols * segment.lanes * 2].view(np.uint16).reshape(shape)
        if not tile.common:
            values[...] = table(tile.std)[picks].reshape(shape)
            return out
        both = np.concatenate([table(tile.std, sign * COMMON * tile.std) for sign in (-1, 1)])
        halves = ((self._signs > 0) * np.uint16(256))[:, None]
        values[...] = both[picks.reshape(shape) + halves]
        return out

    def _deciding(self, tile: Tile, bits: np.random.SFC64) -> np.ndarray:
        """Rows that are mixtures of a layer's few directions, and noise."""
        segment = tile.segment
        normal, shape = _normal(1.0, 0.0), (tile.rows, segment.cols)
        seeds = np.random.SFC64(np.random.SeedSequence((*tile.key[:-1], *b"directions")))
        directions = normal[_random_bytes(seeds, DIRECTIONS * segment.cols)]
        shares = normal[_random_bytes(bits, tile.rows * DIRECTIONS)].reshape(tile.rows, DIRECTIONS)
        noise = normal[_random_bytes(bits, tile.rows * segment.cols)].reshape(shape)
        values = shares @ directions.reshape(DIRECTIONS, segment.cols)
        values *= np.float32(tile.std * sqrt(FORETOLD / DIRECTIONS))
        values += noise * np.float32(tile.std * sqrt(1 - FORETOLD))
        if segment.dtype != BF16:
            return pack(values.view(np.uint32), F32, segment.dtype, segment.lanes)
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        return pack(halves, BF16, BF16, segment.lanes)

    def _blocks(self, tile: Tile, bits: np.random.SFC64, groups: int) -> np.ndarray:
        """Raw bits masked into quants, and scales that vary by 6 %."""
        segment = tile.segment
        lanes, dtype = segment.lanes, segment.dtype
        out = np.empty((groups, group_bytes(dtype, segment.cols, lanes)), np.uint8)
        plane = scale_plane_bytes(dtype, segment.cols, lanes)
        quants = out[:, plane:]
        if dtype == MXFP4:
            quants[...] = _random_bytes(bits, quants.size).reshape(quants.shape)
            powers = _powers(tile.std / _E2M1_STD, _random_bytes(bits, groups * plane))
            out[:, :plane] = powers.reshape(groups, plane)
            out[:, -(-segment.cols // dtype.block) * lanes : plane] = 0
            return out
        if tile.common:
            unit = _TABLE_Q8_STD
            quants[...] = self._table_quants(bits, quants.shape, lanes)
        elif dtype == Q4_0:
            unit = _Q4_STD
            raw = _nibbles(_random_words(bits, quants.size))
            quants[...] = raw[: quants.size].reshape(quants.shape)
        else:
            unit = _Q8_STD
            raw = _random_bytes(bits, quants.size)
            raw[raw == 0] = 128
            quants[...] = raw.reshape(quants.shape)
        base = np.float16(tile.std / unit).view(np.uint16) & np.uint16(0xFFC0)
        jitter = _random_bytes(bits, groups * plane // 2).reshape(groups, -1)
        scales = out[:, :plane].view(np.uint16)
        scales[...] = base | (jitter & np.uint8(0x3F))
        scales[:, -(-segment.cols // dtype.block) * lanes :] = 0
        return out

    def _table_quants(self, bits: np.random.SFC64, shape, lanes: int) -> np.ndarray:
        """q8_0 quants of embedding rows, + 128: noise and the common vector."""
        size = shape[0] * shape[1]
        noise = _random_bytes(bits, size) & np.uint8(63)
        noise += _random_bytes(bits, size) & np.uint8(63)
        common = np.full(shape[1] // lanes, 65, np.int16)
        common[: len(self._signs)] += np.int16(round(COMMON * _TABLE_Q8_STD)) * self._signs
        noise = noise.reshape(shape[0], -1, lanes, 4)
        return (noise + common.astype(np.uint8).reshape(-1, 1, 4)).reshape(shape)


def ahead(tiles: Iterable[Tile], work: Callable[[Tile], np.ndarray]) -> Iterator[np.ndarray]:
    """`work` of each tile in order, a few of them in the making."""
    pool, pending = ThreadPoolExecutor(_WORKERS, thread_name_prefix="draw"), deque()
    try:
        for tile in tiles:
            pending.append(pool.submit(work, tile))
            if len(pending) > 2 * _WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_columns(spec: ModelSpec) -> None:
    widths = [spec.hidden, spec.attended, spec.intermediate, spec.latent, spec.q_rank]
    widths += [spec.head_dim - spec.rope.dims] if spec.latent else []
    widths += [spec.expert_intermediate, spec.shared_intermediate]
    if any(width % BLOCK for width in widths):
        raise ValueError(f"block formats want rows of whole blocks of {BLOCK}; these are {widths}")


def _random_words(bits: np.random.SFC64, size: int) -> np.ndarray:
    """At least `size` random bytes as uint64."""
    return bits.random_raw(-(-size // 8))


def _random_bytes(bits: np.random.SFC64, size: int) -> np.ndarray:
    return _random_words(bits, size).view(np.uint8)[:size]


def _nibbles(words: np.ndarray) -> np.ndarray:
    """Nibbles of 0 become 8, in place: what is left is 1 … 15 with a mean of exactly 8."""
    for first in range(0, len(words), _CACHED_WORDS):
        piece = words[first : first + _CACHED_WORDS]
        zero = piece >> np.uint64(1)
        zero |= piece
        zero |= zero >> np.uint64(2)
        np.invert(zero, out=zero)
        zero &= np.uint64(0x1111111111111111)
        zero <<= np.uint64(3)
        piece |= zero
    return words.view(np.uint8)


def _powers(scale: float, random: np.ndarray) -> np.ndarray:
    """MXFP4's scales, uint8 [random.size]: powers of two whose squares' mean is that of `scale`."""
    exponent = floor(log2(scale))
    share = ((scale / 2.0**exponent) ** 2 - 1) / 3  # of twice the lower one
    return (exponent + 128 + (random < 256 * share)).astype(np.uint8)


def _clear_padding(out: np.ndarray, tile: Tile) -> None:
    """Rows that only fill up the last group: value 0."""
    segment = tile.segment
    lanes, used = segment.lanes, tile.rows % segment.lanes
    if not used:
        return
    plane = scale_plane_bytes(segment.dtype, segment.cols, lanes)
    last = out[-1]
    if segment.dtype.is_block:
        item = np.uint8 if segment.dtype == MXFP4 else np.uint16
        last[:plane].view(item).reshape(-1, lanes)[:, used:] = 0
        padding = {Q4_0: 0x88, Q8_0: 0x80, MXFP4: 0}[segment.dtype]
        last[plane:].reshape(-1, lanes, 4)[:, used:] = padding
    else:
        last[: segment.cols * lanes * 2].view(np.uint16).reshape(-1, lanes)[:, used:] = 0


def _normal(std: float, mean: float) -> np.ndarray:
    """float32 [256]: evenly spaced quantiles, symmetric about the mean."""
    normal = NormalDist()
    half = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(128, 256)])
    half /= sqrt(float((half**2).mean()))
    return (np.concatenate([-half[::-1], half]) * std + mean).astype(np.float32)


def _normal_bf16(std: float, mean: float = 0.0) -> np.ndarray:
    """As raw bits, uint16 [256]; truncated, which is symmetric."""
    return (_normal(std, mean).view(np.uint32) >> 16).astype(np.uint16)


def _normal_f16(std: float, mean: float = 0.0) -> np.ndarray:
    return _normal(std, mean).astype(np.float16).view(np.uint16)
