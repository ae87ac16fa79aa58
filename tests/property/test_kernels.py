"""Every native operation against its meaning in reference.py, over boundary shapes, on every ISA.

Two claims: results are within a stated bound of float64, and they are the same bytes on every
instruction set that runs here, for every thread count, and for tokens alone or together. u is the
unit roundoff of float32, 2^-24; a bound of c·n·u on a sum of n terms is the usual one, with the
terms' magnitudes added up (Higham, Accuracy and Stability, §3.1).
"""

import itertools

import numpy as np
import pytest
from boundaries import DIMENSIONS
from random_bundles import Bundle, columns, floats

from edgemem import dtypes
from edgemem._native import ffi, isa_names, lib
from edgemem.dtypes import BY_NAME, KV_TYPES, DType
from edgemem.errors import UnsupportedError
from edgemem.kernels import ACTIVATION_CODES, Array, Core, Linears, Ops, Tensors, reference
from edgemem.spec import ACTIVATIONS, GATES, RopeSpec

U = 2.0**-24
ISAS = isa_names()
THREADS = (1, 3)
TOKENS = (1, 2, 5, 17)
SCRATCH = 32 << 20
HEADS = [(1, 1, 2), (4, 2, 16), (6, 1, 18), (3, 3, 64), (40, 1, 34), (16, 2, 128)]
"""(query heads, key/value heads, head size)"""


@pytest.fixture(scope="module")
def cores() -> list[Core]:
    """One core per instruction set and thread count; all must give the first one's bytes."""
    made = [Core(threads, isa) for isa in ISAS for threads in THREADS]
    for core in made:
        core.reserve(SCRATCH)
    return made


def on_all(cores, run) -> np.ndarray:
    """run(core) → array, on every core; asserts that all are the same bytes, and returns one."""
    results = [(core, run(core)) for core in cores]
    _, first = results[0]
    for core, result in results[1:]:
        same = result.tobytes() == first.tobytes()
        assert same, f"{core.isa} with {core.threads} threads differs from {cores[0].isa}"
    return first


def product(core, bundle: Bundle, x: np.ndarray, bias: bool, start: np.ndarray | None):
    """W x + b [+ start] through the native product."""
    out = Array((len(x), bundle.layout["w"].rows))
    if start is not None:
        out.array[:] = start
    parts, ops = [("w", "b" if bias else None, out)], Ops(core)
    linears = Linears(Tensors(bundle.layout, bundle.address), parts, start is not None)
    linears.add_to(ops, ffi.cast("float *", x.ctypes.data), "multiplying")
    ops.run(len(x))
    return out.array


@pytest.mark.parametrize("name", BY_NAME)
def test_products(name, cores, rng):
    dtype = BY_NAME[name]
    few = DIMENSIONS[::3] if dtype in dtypes.GGUF_BLOCKS else DIMENSIONS
    shapes = itertools.product(few, [n for n in columns(dtype) if dtype.block > 32 or n in few])
    for i, (rows, cols) in enumerate(shapes):
        tokens, bias, accumulate = TOKENS[i % len(TOKENS)], i % 3 == 0, i % 5 == 0
        parts = [("w", dtype, 16, rows, cols), ("b", dtypes.F32, 1, 1, rows)]
        bundle = Bundle(rng, parts)
        x, start = floats(rng, tokens, cols), floats(rng, tokens, rows) if accumulate else None
        found = on_all(cores, lambda c: product(c, bundle, x, bias, start))  # noqa: B023
        weights, acts, steps = bundle.values["w"], x.astype(np.float64), cols
        if dtype.is_block:
            quants, scales = reference.quantize_blocks(x)
            acts = (quants * scales[..., None].astype(np.float64)).reshape(tokens, -1)[:, :cols]
            steps = 2 * quants.shape[1]
        added = [bias * bundle.values["b"], start if accumulate else 0]
        expected = acts @ weights.T + sum(added)
        magnitude = np.abs(acts) @ bundle.sizes["w"].T + sum(np.abs(a) for a in added)
        bound = (steps + 3) * U * magnitude
        assert (np.abs(found - expected) <= bound).all(), (rows, cols, tokens)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_token_alone_gives_the_bytes_it_gives_among_others(name, cores, rng):
    (cols,) = columns(BY_NAME[name], 251)
    bundle = Bundle(rng, [("w", BY_NAME[name], 16, 101, cols)])
    x = floats(rng, 33, cols)
    together = product(cores[0], bundle, x, False, None)
    for core in cores:
        alone = [product(core, bundle, x[i : i + 1], False, None) for i in range(len(x))]
        assert np.concatenate(alone).tobytes() == together.tobytes(), core.isa


def test_scales_of_activations_are_float16(rng):
    """As in llama.cpp, from max |x| / 127, rounded once; quants come from the exact scale."""
    x = floats(rng, 50, 320)
    quants, scales = reference.quantize_blocks(x)
    exact = np.abs(x.reshape(50, -1, 32)).max(axis=-1) / np.float32(127)
    assert scales.dtype == np.float32
    np.testing.assert_array_equal(scales, exact.astype(np.float16))
    assert np.abs(x.reshape(quants.shape) - quants * exact[..., None]).max() <= 0.501 * exact.max()


@pytest.mark.parametrize("name", [name for name, d in BY_NAME.items() if d.is_block])
def test_activations_may_have_any_size(name, cores, rng):
    """Scales are float16 in precision only: beyond its range nothing overflows or loses bits."""
    (cols,) = columns(BY_NAME[name], 96)
    bundle, x = Bundle(rng, [("w", BY_NAME[name], 16, 48, cols)]), floats(rng, 3, cols)
    expected = product(cores[0], bundle, x, False, None)
    for exponent in (-90, -30, -15, 15, 30, 90):
        size = np.float32(2.0**exponent)
        found = on_all(cores, lambda c: product(c, bundle, x * size, False, None))  # noqa: B023
        np.testing.assert_array_equal(found, expected * size)


@pytest.mark.parametrize("lanes", (1, dtypes.LANES))
@pytest.mark.parametrize("name", BY_NAME)
def test_gathering_rows_is_exact(name, lanes, cores, rng):
    for cols in columns(BY_NAME[name]):
        rows = [37 // lanes * lanes or 1] * 2 + [5]
        bundles = [Bundle(rng, [("rows", BY_NAME[name], lanes, n, cols)]) for n in rows]
        ids = rng.integers(0, sum(rows), 9).astype(np.int32)
        out = Array((len(ids), cols))

        def gather(core, bundles=bundles, ids=ids, out=out):
            at, segment = Array(len(bundles), np.uint64), bundles[0].layout["rows"]
            args = segment.rows, segment.dtype.code, segment.lanes, segment.cols
            args += ffi.cast("int32_t *", ids.ctypes.data), len(ids), out.pointer
            out.array[:] = 7
            for here in ([1], range(3)):  # the rows of bundles that are not there stay
                at.array[here] = [bundles[i].address for i in here]
                assert lib.em_embed(core.handle, at.pointer, *args) == lib.EM_OK
                there = np.isin(ids // segment.rows, here)
                assert (out.array[~there] == 7).all()
            return out.array.copy()

        found = on_all(cores, gather)
        values = np.concatenate([b.values["rows"] for b in bundles])[ids]
        assert np.array_equal(found.view("u4"), values.astype(np.float32).view("u4")), cols


@pytest.mark.parametrize("biased", (False, True))
def test_norms(biased, cores, rng):
    for cols, eps in itertools.product(DIMENSIONS, (1e-5, 0.1)):
        x, weight = floats(rng, 5, cols) * 7 + 3 * biased, floats(rng, cols)
        bias = floats(rng, cols) if biased else None

        def norm(core, x=x, weight=weight, bias=bias, eps=eps):
            out = Array(x.shape)
            vectors = _pointer(weight), _pointer(bias) if biased else ffi.NULL
            status = lib.em_norm(core.handle, _pointer(x), *vectors, eps, *x.shape, out.pointer)
            assert status == lib.EM_OK
            return out.array

        wide, eps = x.astype(np.float64), np.float32(eps)
        plain = reference.rms_norm(wide, weight, eps)
        expected = reference.layer_norm(wide, weight, bias, eps) if biased else plain
        size = np.abs(expected)
        if biased:
            spread = np.sqrt(wide.var(axis=-1, keepdims=True) + eps)
            size += np.abs(weight) * (np.abs(wide).max(-1, keepdims=True) / spread + 1) + abs(bias)
        error = np.abs(on_all(cores, norm) - expected)
        assert (error <= (cols / 2 + 8) * U * size).all(), cols


def test_sigmoid(cores, rng):
    for count in DIMENSIONS:
        x = floats(rng, count) * 20

        def sigmoid(core, x=x):
            out = x.copy()
            assert lib.em_sigmoid(core.handle, _pointer(out), len(out)) == lib.EM_OK
            return out

        expected = 1 / (1 + np.exp(-x.astype(np.float64)))
        assert (np.abs(on_all(cores, sigmoid) - expected) <= 16 * U * expected).all()


def test_softmax(cores, rng):
    for cols in DIMENSIONS:
        x = floats(rng, 3, cols) * 20

        def softmax(core, x=x):
            out = x.copy()
            assert lib.em_softmax(core.handle, _pointer(out), *out.shape) == lib.EM_OK
            return out

        expected = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
        expected /= expected.sum(axis=1, keepdims=True)
        error = np.abs(on_all(cores, softmax) - expected)
        assert (error <= (cols + 60) * U * expected + 1e-37).all(), cols


def test_quantizing(cores, rng):
    for cols in DIMENSIONS:
        x, blocks = floats(rng, 3, cols) * 20, -(-cols // 32)

        def quantize(core, x=x, blocks=blocks):
            q = ffi.new("int8_t[]", 3 * blocks * 32)
            scale, total = Array((3, blocks)), Array((3, blocks), np.int32)
            args = _pointer(x), *x.shape, q, scale.pointer, total.pointer
            assert lib.em_quantize(core.handle, *args) == lib.EM_OK
            found = np.frombuffer(ffi.buffer(q), np.int8).reshape(3, blocks, 32)
            assert np.array_equal(found.sum(axis=2, dtype=np.int32), total.array)
            return np.concatenate([found.astype(np.float32), scale.array[..., None]], axis=2)

        found = on_all(cores, quantize)
        quants, scales = reference.quantize_blocks(x)
        assert np.array_equal(found[..., :32], quants), cols
        assert np.array_equal(found[..., 32], scales), cols


def run_ffn(core, bundles, x, pairs, activation: str) -> np.ndarray:
    """pairs: per bundle, (token, weight) of each token that it computes."""
    layout = bundles[0].layout

    def offset(name: str) -> int:
        return layout[name].offset if name in layout else -1

    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    codes = [layout[name].dtype.code if name in layout else 0 for name in names[:3]]
    shape = x.shape[1], layout["up"].rows, ACTIVATION_CODES[activation]
    ffn = ffi.new("em_ffn *", [*map(offset, names), *codes, *shape])
    addresses = np.array([b.address for b in bundles], np.uint64)
    first = np.cumsum([0] + [len(p) for p in pairs], dtype=np.int32)
    tokens = np.array([t for p in pairs for t, _ in p], np.int32)
    weights = np.array([w for p in pairs for _, w in p], np.float32)
    out = np.zeros_like(x)
    status = lib.em_ffn_run(
        core.handle, ffn, len(bundles), _pointer(addresses, "uint64_t *"), ffi.NULL, ffi.NULL,
        _pointer(first, "int32_t *"), _pointer(tokens, "int32_t *"), _pointer(weights),
        _pointer(x), len(x), _pointer(out),
    )  # fmt: skip
    assert status == lib.EM_OK
    return out


def ffn_bundles(rng, dtype: DType, count: int, hidden: int, width: int, bias: bool, gated=True):
    inner = ("gate", "up") if gated else ("up",)
    biases = [*((f"{name}_bias", width) for name in inner), ("down_bias", hidden)] if bias else []
    shapes = [
        *((name, dtype, 16, width, hidden) for name in inner),
        *((name, dtypes.F32, 1, 1, size) for name, size in biases),
        ("down", dtype, 16, hidden, width),
    ]  # fmt: skip
    return [Bundle(rng, shapes) for _ in range(count)]


def some_pairs(rng, bundles: int, tokens: int):
    """Each bundle gets some tokens, in ascending order, at least one."""
    chosen = [np.flatnonzero(rng.random(tokens) < 0.6) for _ in range(bundles)]
    return [[(int(t), float(rng.random())) for t in (c if len(c) else [0])] for c in chosen]


@pytest.mark.parametrize(
    "activation, gated",
    [*((name, gated) for name in ACTIVATIONS for gated in (True, False)), (*GATES, True)],
)
def test_ffn_in_floats(activation, gated, cores, rng):
    """Errors of gate, up and down add up; no activation has a slope over 1.2, relu2's is 2|g|."""
    for i, (hidden, width) in enumerate(itertools.product((1, 17, 32, 101), (1, 16, 33, 251))):
        dtype, tokens = (dtypes.F32, dtypes.F16, dtypes.BF16)[i % 3], TOKENS[i % len(TOKENS)]
        bundles = ffn_bundles(rng, dtype, 3, hidden, width, i % 2 == 0, gated)
        x, pairs = floats(rng, tokens, hidden), some_pairs(rng, 3, tokens)
        x *= 6 if activation in GATES else 1  # some are clamped
        args = bundles, x / np.float32(np.sqrt(hidden)), pairs, activation
        found = on_all(cores, lambda c: run_ffn(c, *args))  # noqa: B023
        expected, magnitude = np.zeros(x.shape), np.zeros(x.shape)
        for bundle, chosen in zip(bundles, pairs, strict=True):
            absolute = {name: np.abs(v) for name, v in bundle.values.items()}
            for token, weight in chosen:
                row = args[1][token : token + 1].astype(np.float64)
                y = reference.ffn(row, bundle.values, activation)
                expected[token] += np.float32(weight) * y[0]
                inner, up = (
                    reference.linear(abs(row), absolute[name], absolute.get(f"{name}_bias"))
                    for name in (("gate", "up") if gated else ("up", "up"))
                )
                inner = 2 * inner**2 if activation == "relu2" else inner + 1
                inner *= up + (activation in GATES) if gated else 1
                y = reference.linear(inner, absolute["down"], absolute.get("down_bias"))
                magnitude[token] += weight * y[0]
        bound = (2 * hidden + width + 40) * U * magnitude
        assert (np.abs(found - expected) <= bound).all(), (hidden, width, dtype.name)


@pytest.mark.parametrize("name", ("q8_0", "q4_0"))
def test_ffn_in_blocks(name, cores, rng):
    """The same bytes everywhere; and near what the weights mean, but for activations of 8 bits."""
    for hidden, width in ((32, 32), (33, 101), (251, 64)):
        bundles = ffn_bundles(rng, BY_NAME[name], 3, hidden, width, bias=False)
        x, pairs = floats(rng, 17, hidden), some_pairs(rng, 3, 17)
        found = on_all(cores, lambda c: run_ffn(c, bundles, x, pairs, "silu"))  # noqa: B023
        expected = np.zeros(x.shape)
        for bundle, chosen in zip(bundles, pairs, strict=True):
            for token, weight in chosen:
                row = x[token : token + 1].astype(np.float64)
                expected[token] += weight * reference.ffn(row, bundle.values, "silu")[0]
        assert np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()


FLOATS = {"f16": np.float16, "f32": np.float32}


class Cache:
    """One layer's attention on one core, fed step by step, as a session does it."""

    def __init__(self, core, kv, heads: int, kv_heads: int, head_dim: int, window: int, context):
        self.core, self.kv, code = core, kv, BY_NAME[kv].code
        # Painted, for nothing but what was stored may be read.
        context = -(-context // 16) * 16
        shape = kv_heads, context, lib.em_kv_row_bytes(code, head_dim)
        self.keys, self.values = np.full(shape, 0x7F, np.uint8), np.full(shape, 0x7F, np.uint8)
        self.struct = ffi.new("em_attention *", [
            heads, kv_heads, head_dim, window, 0, 0, code, 0, 0, context,
            _pointer(self.keys, "void *"), _pointer(self.values, "void *"),
        ])  # fmt: skip

    def kept(self, length: int, head_dim: int) -> list[np.ndarray]:
        """What keys and values are, float64 [length, kv_heads, head_dim]; checks padding."""
        found = []
        for rows in (self._key_rows(), self._value_rows()):
            rows = rows[:, :length]
            assert not rows[..., head_dim:].any()
            found.append(rows[..., :head_dim].transpose(1, 0, 2))
        return found

    def _value_rows(self) -> np.ndarray:
        if self.kv != "q8_0":
            return self.values.view(FLOATS[self.kv]).astype(np.float64)
        blocks = self.values.reshape(*self.values.shape[:2], -1, 34)
        scales = blocks[..., :2].copy().view(np.float16).astype(np.float64)
        return (scales * blocks[..., 2:].view(np.int8)).reshape(*self.values.shape[:2], -1)

    def _key_rows(self) -> np.ndarray:
        heads, context, size = self.keys.shape
        groups = self.keys.reshape(heads, context // 16, 16 * size)
        if self.kv != "q8_0":
            numbers = groups.view(FLOATS[self.kv]).astype(np.float64)
            return numbers.reshape(heads, context // 16, -1, 16).swapaxes(2, 3).reshape(
                heads, context, -1
            )  # fmt: skip
        plane = size // 34 * 32
        scales = groups[..., :plane].copy().view(np.float16).astype(np.float64)
        scales = scales.reshape(heads, context // 16, -1, 16).swapaxes(2, 3)
        quants = groups[..., plane:].reshape(heads, context // 16, -1, 16, 4).swapaxes(2, 3)
        quants = quants.reshape(heads, context, -1, 32).astype(np.float64) - 128
        return (scales.reshape(heads, context, -1, 1) * quants).reshape(heads, context, -1)

    def step(self, q, k, v, cos, sin, position: int, sinks=None) -> tuple[np.ndarray, np.ndarray]:
        """(the rotated queries, what attention gives)"""
        q, out, n = q.copy(), np.zeros_like(q), len(q)
        handle, tables = self.core.handle, (_pointer(cos), _pointer(sin))
        args = _pointer(q), _pointer(k), _pointer(v), *tables, position, n
        assert lib.em_attention_store(handle, self.struct, *args) == lib.EM_OK
        args = ffi.NULL if sinks is None else _pointer(sinks), _pointer(q), position, n
        assert lib.em_attention_run(handle, self.struct, *args, _pointer(out)) == lib.EM_OK
        return q, out


def kv_bound(kv: str, x: np.ndarray):
    """How far a cache's numbers may be from x [..., D]."""
    if kv == "q8_0":  # half a quant, and the scale's roundoff on up to 127 of them
        return np.abs(x).max(axis=-1, keepdims=True) * (0.5 / 127 + 2.0**-11)
    # The roundoff of f16, and half its smallest number.
    return 2.0**-11 * np.abs(x) + 2.0**-25 if kv == "f16" else 0.0


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("window", (0, 1, 16, 17, 64, 65))
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_attention(heads, kv_heads, head_dim, window, kv, cores, rng):
    length = 150
    q = floats(rng, length, heads, head_dim)
    k, v = floats(rng, length, kv_heads, head_dim), floats(rng, length, kv_heads, head_dim)
    freqs = reference.frequencies(RopeSpec(), head_dim, 64, 64)
    angles = np.arange(length)[:, None] * freqs
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def run(core, cuts=(0, 1, 17, 63, 64, 65, 130, length)):
        cache = Cache(core, kv, heads, kv_heads, head_dim, window, length + 3)
        parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        steps = [cache.step(q[s], k[s], v[s], cos[s], sin[s], s.start) for s in parts]
        rotated, mixed = (np.concatenate(a) for a in zip(*steps, strict=True))
        parts = rotated, mixed, *cache.kept(length, head_dim)
        return np.concatenate([a.astype(np.float64).ravel() for a in parts])

    found = on_all(cores, run)
    assert run(cores[0], cuts=(0, length)).tobytes() == found.tobytes(), "steps must not matter"
    sizes = np.cumsum([q.size, q.size, k.size])
    rotated, mixed, keys, values = np.split(found, sizes)
    rotated, mixed = rotated.reshape(q.shape), mixed.reshape(q.shape)
    keys, values = keys.reshape(k.shape), values.reshape(v.shape)
    at = np.arange(length)
    turned = reference.rotate(k.astype(np.float64), at, freqs, 1.0)
    assert (np.abs(keys - turned) <= kv_bound(kv, turned) + 8 * U).all()
    assert np.array_equal(values, reference.kept(v, kv))
    assert (np.abs(values - v) <= kv_bound(kv, v)).all()
    turned = reference.rotate(q.astype(np.float64), at, freqs, 1.0)
    assert np.abs(rotated - turned).max() <= 8 * U * np.abs(q).max()
    queries = reference.rounded_queries(rotated) if kv == "q8_0" else rotated.astype(np.float64)
    expected = reference.attend(queries, keys, values, window)
    size = head_dim * np.abs(rotated).max() * np.abs(keys).max() / np.sqrt(head_dim)
    bound = (head_dim * size + length + 16) * U * np.abs(values).max()
    assert np.abs(mixed - expected).max() <= bound


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("scale, cap, dims", [(0.3, 0.0, 0), (0.0, 2.0, 0), (0.5, 1.0, 4)])
@pytest.mark.parametrize("sinks", (False, True))
def test_attention_with_its_options(sinks, scale, cap, dims, kv, cores, rng):
    length, heads, kv_heads, head_dim = 90, 4, 2, 18
    q = floats(rng, length, heads, head_dim)
    k, v = floats(rng, length, kv_heads, head_dim), floats(rng, length, kv_heads, head_dim)
    freqs = reference.frequencies(RopeSpec(dims=dims), head_dim, 64, 64)
    angles = np.arange(length)[:, None] * freqs
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    sinks = floats(rng, heads) * 4 if sinks else None

    def run(core):
        cache = Cache(core, kv, heads, kv_heads, head_dim, 40, length)
        cache.struct.scale, cache.struct.cap, cache.struct.rotary = scale, cap, dims
        mixed = cache.step(q, k, v, cos, sin, 0, sinks)
        return np.concatenate([a.astype(float).ravel() for a in (*mixed, *cache.kept(length, 18))])

    found = np.split(on_all(cores, run), np.cumsum([q.size, q.size, k.size]))
    rotated, mixed, keys, values = (
        a.reshape(b.shape) for a, b in zip(found, (q, q, k, v), strict=True)
    )
    turned = reference.rotate(q.astype(float), np.arange(length), freqs, 1.0)
    assert np.abs(rotated - turned).max() <= 8 * U * np.abs(q).max()
    turned = reference.rotate(k.astype(float), np.arange(length), freqs, 1.0)
    assert (np.abs(keys - turned) <= kv_bound(kv, turned) + 8 * U).all()
    queries = reference.rounded_queries(rotated, scale) if kv == "q8_0" else rotated
    expected = reference.attend(queries, keys, values, 40, scale, cap, sinks)
    assert np.abs(mixed - expected).max() <= 1e-4 * np.abs(values).max()


def test_elements(cores, rng):
    for n in (0, 1, 17, 4096, 9001):
        x, y = floats(rng, n) * 3, floats(rng, n)

        def run(core):
            scaled, capped, sums = x.copy(), x.copy(), x.copy()  # noqa: B023
            assert lib.em_scale(core.handle, _pointer(scaled), n, 0.3) == lib.EM_OK  # noqa: B023
            assert lib.em_cap(core.handle, _pointer(capped), n, 1.5) == lib.EM_OK  # noqa: B023
            ends = _pointer(sums), _pointer(y)  # noqa: B023
            assert lib.em_add(core.handle, *ends, n, -0.7) == lib.EM_OK  # noqa: B023
            return np.concatenate([scaled, capped, sums])

        scaled, capped, sums = np.split(on_all(cores, run), 3)
        assert np.array_equal(scaled, x * np.float32(0.3))
        assert np.abs(capped - reference.capped(x.astype(float), 1.5)).max(initial=0) <= 16 * U
        assert np.abs(sums - (x - 0.7 * y.astype(float))).max(initial=0) <= 32 * U


def test_clamping_is_exact(rng):
    x = floats(rng, 251) * 3
    clamped = x.copy()
    assert lib.em_clamp(_pointer(clamped), len(x), 1.5) == lib.EM_OK
    assert np.array_equal(clamped, np.clip(x, -1.5, 1.5))


def test_an_instruction_set_that_does_not_run_is_refused():
    with pytest.raises(UnsupportedError):
        Core(1, "abacus")


def _pointer(array: np.ndarray, ctype: str = "float *"):
    assert array.flags.c_contiguous
    return ffi.cast(ctype, array.ctypes.data)
