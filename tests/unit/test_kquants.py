"""Searched blocks: they decode as the gguf package says, and come as close as llama.cpp's do."""

import ctypes

import gguf
import numpy as np
import pytest
from boundaries import LANES
from edgemem.converters import blocks, kquants

from edgemem._native import crc32c
from edgemem.dtypes import BF16, F16, F32, Q2_K, Q3_K, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0
from edgemem.kernels.reference import unpack

f32 = np.float32
K_QUANTS = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
FORMS = {
    Q5_0: (32, -16, 15),
    Q2_K: (16, 0, 3), Q3_K: (16, -4, 3), Q4_K: (32, 0, 15), Q5_K: (32, 0, 31), Q6_K: (16, -32, 31),
}  # fmt: skip
"""Columns that share a scale, and the range of quants."""
of_every_format = pytest.mark.parametrize("dtype", FORMS, ids=lambda d: d.name)
of_256_columns = pytest.mark.parametrize("dtype", K_QUANTS, ids=lambda d: d.name)


def gaussian(rng, shape):
    return rng.normal(size=shape)


def heavy_tailed(rng, shape):
    return rng.standard_t(3, size=shape)


def with_outliers(rng, shape):
    return rng.normal(size=shape) * np.where(rng.random(shape) < 0.005, 15, 1)


def uneven_columns(rng, shape):
    return rng.normal(size=shape) * np.exp(rng.normal(size=shape[1]))


def far_from_zero(rng, shape):
    return rng.normal(size=shape) + 2


def sparse(rng, shape):
    return rng.normal(size=shape) * (rng.random(shape) < 0.1)


DRAWS = (gaussian, heavy_tailed, with_outliers, uneven_columns, far_from_zero, sparse)
drawn = pytest.mark.parametrize("draw", DRAWS, ids=lambda d: d.__name__)


def values_of(rows: np.ndarray, dtype) -> np.ndarray:
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[dtype.name.upper()])


def error(x: np.ndarray, found: np.ndarray, dtype) -> float:
    """Σ w·(found − x)², w = |x| + the root mean square of x's part: what is minimised."""
    parts = x.astype(np.float64).reshape(-1, FORMS[dtype][0])
    w = np.abs(parts) + np.sqrt((parts**2).mean(axis=1, keepdims=True))
    return float((w * (found.reshape(parts.shape) - parts) ** 2).sum())


@of_every_format
@drawn
def test_values_are_those_of_the_package(dtype, draw, rng):
    """Bit for bit, in GGML's blocks and in a store of any lanes; the right number of each."""
    x = draw(rng, (LANES + 5, 3 * dtype.block)).astype(f32)
    rows = kquants.quantize(x, dtype)
    expected = values_of(rows, dtype)
    for lanes in (1, LANES):
        packed = blocks.pack(x.view(np.uint32), F32, dtype, lanes)
        assert np.array_equal(packed, blocks.pack(rows, dtype, dtype, lanes))
        found = unpack(packed.tobytes(), dtype, *x.shape, lanes).astype(f32)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.fixture(scope="module")
def llama_cpp():
    """llama_cpp(x, dtype): the values of the rows that its ggml_quantize_chunk makes."""
    try:
        import llama_cpp.llama_cpp
    except ImportError:
        pytest.skip("llama-cpp-python is not installed: errors were not held to llama.cpp's")
    library = ctypes.CDLL(None, handle=llama_cpp.llama_cpp._lib._handle)
    chunk = library.ggml_quantize_chunk
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]

    def quantised(x: np.ndarray, dtype) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[dtype.name.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = np.empty((len(x), x.shape[1] // block * size), np.uint8)
        written = chunk(int(kind), x.ctypes.data, rows.ctypes.data, 0, *x.shape, None)
        assert written == rows.nbytes
        return values_of(rows, dtype)

    return quantised


@of_every_format
@drawn
def test_errors_are_no_larger_than_those_of_llama_cpp(dtype, draw, rng, llama_cpp):
    """With the weights that are minimised, and without any. Its q2_k to q6_k weigh by |x|, x² and
    what is taken here; its q5_0 does not search."""
    x = (draw(rng, (24, 4 * dtype.block)) * 0.02).astype(f32)
    ours, theirs = values_of(kquants.quantize(x, dtype), dtype), llama_cpp(x, dtype)
    assert error(x, ours, dtype) <= 1.02 * error(x, theirs, dtype)
    assert np.square(ours - x).sum() <= 1.02 * np.square(theirs - x).sum()


@of_every_format
@drawn
def test_errors_are_smaller_than_with_plain_scales(dtype, draw, rng):
    """Each part from its smallest weight (or 0) to its largest, scales and minima not rounded."""
    size, lowest, highest = FORMS[dtype]
    x = draw(rng, (24, 2 * dtype.block)).astype(f32)
    parts = x.reshape(-1, size).astype(np.float64)
    if lowest < 0:
        least, scale = 0, np.abs(parts).max(axis=1, keepdims=True) / highest
    else:
        least = np.minimum(parts.min(axis=1, keepdims=True), 0)
        scale = (parts.max(axis=1, keepdims=True) - least) / highest
    quants = np.rint(np.divide(parts - least, scale, out=np.zeros_like(parts), where=scale > 0))
    plain = quants * scale + least
    found = values_of(kquants.quantize(x, dtype), dtype)
    assert error(x, found, dtype) < error(x, plain, dtype)


@of_every_format
def test_fits_of_parts_are_nearly_the_best_there_are(dtype, rng):
    """Against every scale and least value of a fine net."""
    size, lowest, highest = FORMS[dtype]
    x = rng.normal(size=(size, 1, 48)).astype(f32)
    scale, least = (v[0].astype(np.float64) for v in tile(x, dtype).fitted())
    w = np.abs(x) + np.sqrt(np.square(x).mean(axis=0))

    def errors(scale, least):
        quants = np.clip(np.rint((x[:, 0] - least) / scale), lowest, highest)
        return (w[:, 0] * (quants * scale + least - x[:, 0]) ** 2).sum(axis=0)

    best = np.full(48, np.inf)
    bottom, peak = x.min(axis=0)[0], np.abs(x).max(axis=0)[0]
    for share in np.linspace(0.4, 1.1, 120):
        if lowest < 0:
            trials = [(sign * share * peak / highest, 0) for sign in (-1, 1)]
        else:
            span = x.max(axis=0)[0] - bottom
            trials = [(share * span / highest, part * bottom) for part in np.linspace(0.4, 1.1, 60)]
        for some in trials:
            best = np.minimum(best, errors(*some))
    more = 1.3 if dtype == Q6_K else 1.1  # with many quants many scales are nearly as good
    assert errors(scale, least).sum() <= more * best.sum()


def tile(x: np.ndarray, dtype) -> kquants._Tile:
    return kquants._Tile(x, kquants._FORMS[dtype])


@of_every_format
def test_what_lies_on_a_grid_stays_as_it_is(dtype, rng):
    """All quants in each part, one scale that f16 holds, zero among the values."""
    size, lowest, highest = FORMS[dtype]
    ends = rng.choice([lowest, highest], (3 * dtype.block // size, size))
    ends[:, :2] = lowest, highest
    inside = rng.integers(lowest, highest + 1, ends.shape)
    x = np.where(rng.random(ends.shape) < 0.5, ends, inside).astype(f32)
    x[:, :2] = lowest, highest
    x = (x - (highest // 2 if lowest == 0 else 0)).reshape(3, -1) / 256
    found = values_of(kquants.quantize(x, dtype), dtype)
    np.testing.assert_allclose(found, x, rtol=0, atol=np.abs(x).max() / 1000)


@of_every_format
def test_a_block_does_not_depend_on_those_beside_it(dtype, rng, monkeypatch):
    x = rng.normal(size=(5, 3 * dtype.block)).astype(f32)
    whole = kquants.quantize(x, dtype)
    for row in range(5):
        assert np.array_equal(kquants.quantize(x[row : row + 1], dtype)[0], whole[row])
    monkeypatch.setattr(kquants, "_TILE_ELEMENTS", dtype.block)
    assert np.array_equal(kquants.quantize(x, dtype), whole)


BYTES = {
    Q5_0: 0x39706B31, Q2_K: 0xCE720AC3, Q3_K: 0xEA613F6B, Q4_K: 0xE41B82B1,
    Q5_K: 0x75871D77, Q6_K: 0x6C6ACACA,
}  # fmt: skip
"""Of the blocks below, as crc32c: the same whatever the processor and numpy."""


@of_every_format
def test_the_same_weights_give_the_same_bytes_everywhere(dtype):
    numbers = np.arange(7 * dtype.block)
    x = (numbers * 7919 % 2003 - 1001).astype(f32) * (numbers % 61 + 3).astype(f32) / 65536
    assert crc32c(kquants.quantize(x.reshape(7, -1), dtype)) == BYTES[dtype]


@of_every_format
def test_hard_blocks(dtype):
    """Nothing but zeros stays that; constants stay close; what f16 cannot scale becomes small."""
    block = dtype.block
    for value in (0.0, -0.0, 1.0, -1.0, 1000.0, -3e-3):
        x = np.full((1, block), value, f32)
        found = values_of(kquants.quantize(x, dtype), dtype)
        assert np.abs(found - x).max() <= abs(value) / 30
    for size in (1e-4, 1e-5, 1e-6, 1e-20, 1e-42):
        x = (np.cos(np.arange(block)) * size).astype(f32).reshape(1, block)
        found = values_of(kquants.quantize(x, dtype), dtype)
        share = {Q2_K: 0.7, Q3_K: 0.35}.get(dtype, 0.2)
        assert np.abs(found - x).max() <= max(share * size, 2.0**-24)
    single = np.zeros((1, block), f32)
    single[0, 7] = -5
    found = values_of(kquants.quantize(single, dtype), dtype)
    assert abs(found[0, 7] + 5) < 0.01 and np.abs(np.delete(found, 7)).max() < 0.01


@of_every_format
def test_weights_beyond_the_format_are_refused(dtype):
    kind = np.abs(FORMS[dtype][1:]).max()
    most = 65504 * kind * {Q2_K: 15, Q3_K: 32, Q4_K: 63, Q5_K: 63, Q6_K: 128}.get(dtype, 1)
    x = np.full((1, dtype.block), 3e-3, f32)
    x[0, 3] = most
    found = values_of(kquants.quantize(x, dtype), dtype)
    assert np.isfinite(found).all() and found[0, 3] == pytest.approx(most, rel=0.3)
    least = {Q2_K: -65504 * 15, Q4_K: -65504 * 63, Q5_K: -65504 * 63}.get(dtype, -most)
    x[0, 3] = least
    found = values_of(kquants.quantize(x, dtype), dtype)
    assert found[0, 3] == pytest.approx(least, rel=0.3)
    for value in (1.01 * most, 1.01 * least, 3e38, -3e38):
        x[0, 3] = value
        with pytest.raises(ValueError, match="too large to quantise"):
            kquants.quantize(x, dtype)


@of_every_format
@pytest.mark.parametrize("source", (F32, F16, BF16), ids=lambda d: d.name)
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_what_is_not_finite_is_refused(dtype, source, value):
    x = np.ones((LANES + 1, dtype.block), f32)
    x[LANES, 5] = value
    bits = x.astype(np.float16).view(np.uint16) if source == F16 else x.view(np.uint32)
    if source == BF16:
        bits = (bits >> 16).astype(np.uint16)
    with pytest.raises(ValueError, match="NaN or infinite"):
        blocks.pack(bits, source, dtype, LANES)


@of_256_columns
def test_other_blocks_are_quantised_by_their_values(dtype, rng):
    rows = gguf.quants.quantize(
        rng.normal(size=(3, 512)).astype(f32), gguf.GGMLQuantizationType.Q8_0
    )
    values = blocks.dequantize(rows, Q8_0)
    expected = blocks.pack(values.view(np.uint32), F32, dtype, LANES)
    assert np.array_equal(blocks.pack(rows, Q8_0, dtype, LANES), expected)


def test_rows_are_filled_up_to_whole_blocks(rng):
    x = rng.normal(size=(3, 45)).astype(f32)
    filled = np.pad(x, ((0, 0), (0, 19)))
    assert np.array_equal(kquants.quantize(x, Q5_0), kquants.quantize(filled, Q5_0))
    packed = blocks.pack(x.view(np.uint32), F32, Q5_0, LANES)
    found = unpack(packed.tobytes(), Q5_0, *x.shape, LANES)
    assert np.array_equal(found, values_of(kquants.quantize(x, Q5_0), Q5_0)[:, :45])
