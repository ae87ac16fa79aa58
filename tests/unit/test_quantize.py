"""Packing and quantising, held to FORMAT.md byte by byte and to GGML's C code step by step."""

import numpy as np
import pytest
from boundaries import BLOCK, CYCLE, DIMENSIONS, LANES
from edgemem.converters.quantize import BITS, pack, quantize_q4_0, quantize_q8_0, to_f32

from edgemem.dtypes import BF16, F16, F32, Q4_0, Q8_0, group_bytes, scale_plane_bytes

FLOATS = (F32, F16, BF16)
f32 = np.float32


def painted(rows: int, cols: int, dtype) -> np.ndarray:
    """Finite floats as raw bits, no two neighbours alike."""
    paint = (np.arange(rows * cols) * 5 % CYCLE + 1).astype(np.float32) / 16
    paint *= np.where(np.arange(rows * cols) % 3, 1, -1)
    if dtype == F16:
        return paint.astype(np.float16).view(np.uint16).reshape(rows, cols)
    bits = paint.astype(np.float32).view(np.uint32)
    return (bits if dtype == F32 else (bits >> 16).astype(np.uint16)).reshape(rows, cols)


def packed_float(bits: np.ndarray, dtype, lanes: int) -> np.ndarray:
    """FORMAT.md: byte (k·N + r)·s of group g holds row g·N + r, column k."""
    (rows, cols), size = bits.shape, dtype.quant_bytes
    out = np.zeros((-(-rows // lanes), group_bytes(dtype, cols, lanes)), np.uint8)
    for row in range(rows):
        for k in range(cols):
            at = (k * lanes + row % lanes) * size
            out[row // lanes, at : at + size] = bits[row, k : k + 1].view(np.uint8)
    return out


def packed_blocks(values: np.ndarray, dtype, lanes: int) -> np.ndarray:
    """FORMAT.md's formulas for scales and quants, one block at a time."""
    (rows, cols), chunks = values.shape, dtype.quant_bytes // 4
    blocks = -(-cols // BLOCK)
    plane = scale_plane_bytes(dtype, cols, lanes)
    out = np.zeros((-(-rows // lanes), group_bytes(dtype, cols, lanes)), np.uint8)
    out[:, plane:] = 0x80 if dtype == Q8_0 else 0x88
    for row in range(rows):
        for b in range(blocks):
            block = np.zeros(BLOCK, f32)
            block[: cols - b * BLOCK] = values[row, b * BLOCK : (b + 1) * BLOCK]
            scale, quants = (ggml_q8_0 if dtype == Q8_0 else ggml_q4_0)(block)
            group, r = out[row // lanes], row % lanes
            at = (b * lanes + r) * 2
            group[at : at + 2] = np.array([scale], np.float16).view(np.uint8)
            for c in range(chunks):
                for j in range(4):
                    at = plane + ((b * chunks + c) * lanes + r) * 4 + j
                    low = quants[4 * c + j]
                    group[at] = low + 128 if dtype == Q8_0 else low | quants[16 + 4 * c + j] << 4
    return out


def ggml_q8_0(x: np.ndarray) -> tuple[np.float16, list[int]]:
    """quantize_row_q8_0_ref: d = amax / 127, q = roundf(x · 1/d), all in float."""
    d = f32(max(abs(v) for v in x)) / f32(127)
    inverse = f32(1) / d if d else f32(0)
    return np.float16(d), [roundf(v * inverse) for v in x]


def roundf(v: np.float32) -> int:
    """C's roundf: to nearest, halves away from zero; exact, since it is done in double."""
    return int(np.trunc(float(v) + (0.5 if v >= 0 else -0.5)))


def ggml_q4_0(x: np.ndarray) -> tuple[np.float16, list[int]]:
    """quantize_row_q4_0_ref: d = first x of largest magnitude / -8, q = min(15, x · 1/d + 8.5)."""
    amax, peak = f32(0), f32(0)
    for v in x:
        if amax < abs(v):
            amax, peak = abs(v), v
    d = peak / f32(-8)
    inverse = f32(1) / d if d else f32(0)
    return np.float16(d + f32(0)), [min(15, int(v * inverse + f32(8.5))) for v in x]


@pytest.mark.parametrize("lanes", [1, LANES])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_floats_lie_where_the_format_says(dtype, lanes):
    for rows in (1, LANES - 1, LANES, LANES + 1, 3 * LANES):
        for cols in (1, 2, 3, BLOCK, 33):
            bits = painted(rows, cols, dtype)
            packed = pack(bits, dtype, dtype, lanes)
            assert np.array_equal(packed, packed_float(bits, dtype, lanes)), (rows, cols)


@pytest.mark.parametrize("lanes", [1, LANES])
@pytest.mark.parametrize("target", [Q8_0, Q4_0], ids=lambda d: d.name)
@pytest.mark.parametrize("source", FLOATS, ids=lambda d: d.name)
def test_quants_lie_where_the_format_says(source, target, lanes):
    for rows, cols in [(1, 1), (2, 31), (LANES, BLOCK), (LANES + 1, 2 * BLOCK), (3, 101)]:
        bits = painted(rows, cols, source)
        packed = pack(bits, source, target, lanes)
        assert np.array_equal(packed, packed_blocks(to_f32(bits, source), target, lanes))


@pytest.mark.parametrize("cols", DIMENSIONS)
def test_every_length_packs(cols):
    """Sizes fit and a tile boundary changes nothing, for all lengths on the shared list."""
    for source in FLOATS:
        bits = painted(LANES + 3, cols, source)
        for target in (source, F16, F32, Q8_0, Q4_0):
            for lanes in (1, LANES):
                whole = pack(bits, source, target, lanes)
                assert whole.shape == (-(-len(bits) // lanes), group_bytes(target, cols, lanes))
                parts = [pack(bits[i : i + lanes], source, target, lanes)
                         for i in range(0, len(bits), lanes)]  # fmt: skip
                assert np.array_equal(whole, np.concatenate(parts))


def test_tiles_change_nothing(monkeypatch, rng):
    bits = rng.normal(size=(70, 96)).astype(f32).view(np.uint32)
    whole = [pack(bits, F32, target, LANES) for target in (F16, Q8_0, Q4_0)]
    monkeypatch.setattr("edgemem.converters.quantize._TILE_ELEMENTS", 1)
    for target, expected in zip((F16, Q8_0, Q4_0), whole, strict=True):
        assert np.array_equal(pack(bits, F32, target, LANES), expected)


def hard_blocks(rng) -> np.ndarray:
    """Blocks at the edges of rounding: ties, ±max together, zeros, denormals, wide ranges."""
    blocks = [rng.normal(size=32) * 10.0 ** rng.integers(-6, 5) for _ in range(400)]
    ties = (np.arange(32) - 16 + 0.5) * 2  # with d = 1, every value is halfway between quants
    blocks += [np.r_[127, ties[1:]], np.r_[-127, ties[1:]], np.r_[254, ties[1:] / 2]]
    nearly = np.nextafter(f32(0.5), f32(0))
    blocks += [np.r_[127, np.full(31, nearly)], np.r_[127, np.full(31, -nearly)]]
    blocks += [np.zeros(32), -np.zeros(32), np.r_[3, -3, np.zeros(30)], np.r_[-3, 3, np.zeros(30)]]
    blocks += [np.full(32, 1e-42), np.full(32, 1e-38), np.r_[5.2e5, np.ones(31)]]
    blocks += [np.r_[-8, np.arange(-8, 7.5, 0.5)], np.full(32, 65504.0), np.full(32, -5.96e-8)]
    return np.array(blocks).astype(f32)[:, None, :]


def test_q8_0_is_that_of_ggml(rng):
    values = hard_blocks(rng)
    scales, quants = quantize_q8_0(values)
    for block, scale, quant in zip(values[:, 0], scales[:, 0], quants[:, 0], strict=True):
        wanted, wanted_quants = safe(ggml_q8_0, block)
        assert scale == wanted
        assert scale == 0 or (quant.astype(int) - 128).tolist() == wanted_quants


def test_q4_0_is_that_of_ggml(rng):
    values = hard_blocks(rng)
    scales, quants = quantize_q4_0(values)
    for block, scale, quant in zip(values[:, 0], scales[:, 0], quants[:, 0], strict=True):
        wanted, wanted_quants = safe(ggml_q4_0, block)
        assert scale == wanted and (block.any() or not np.signbit(scale))
        assert scale == 0 or [*(quant & 15), *(quant >> 4)] == wanted_quants


def safe(quantize, block):
    """Where the scale vanishes in f16 the quants do not matter, and C leaves them undefined."""
    with np.errstate(all="ignore"):
        try:
            return quantize(block)
        except (OverflowError, ValueError):
            return np.float16(0), []


def test_quantised_values_are_close(rng):
    """Half a step, plus what f16 takes from the scale."""
    values = rng.normal(size=(200, 1, 32)).astype(f32)
    peak = np.abs(values).max(axis=-1, keepdims=True)
    scales, quants = quantize_q8_0(values)
    error = np.abs(values - (quants.astype(f32) - 128) * scales[..., None].astype(f32))
    assert (error <= peak / 254 + peak * 2**-11).all()
    scales, pairs = quantize_q4_0(values)
    quants = np.concatenate([pairs & 15, pairs >> 4], axis=-1).astype(f32) - 8
    error = np.abs(values - quants * scales[..., None].astype(f32))
    assert (error <= peak / 8 + peak * 2**-10).all()  # one side of the range ends at 7


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("lanes", [1, LANES])
def test_no_float_changes_on_its_way(dtype, lanes, rng):
    """All finite bit patterns of 16 bits, a sample of those of 32: kept as they are."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    if dtype == F32:
        bits = rng.integers(0, 1 << 32, (256, 256), dtype=np.uint32)
    bits = np.where(np.isfinite(to_f32(bits, dtype)), bits, 0).astype(BITS[dtype])
    packed = pack(bits, dtype, dtype, lanes).view(BITS[dtype])
    rows = packed.reshape(256 // lanes, 256, lanes).transpose(0, 2, 1).reshape(256, 256)
    assert np.array_equal(rows, bits)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["keep", F16, Q8_0, Q4_0])
def test_what_is_not_finite_is_refused(dtype, value, target):
    for row, col in [(0, 0), (17, 32), (9, 7)]:
        bits = painted(18, 33, dtype)
        special = np.array([value], f32)
        if dtype == F16:
            bits[row, col] = special.astype(np.float16).view(np.uint16)[0]
        else:
            bits[row, col] = special.view(np.uint32)[0] >> (0 if dtype == F32 else 16)
        with pytest.raises(ValueError, match="NaN or infinite"):
            pack(bits, dtype, dtype if target == "keep" else target, LANES)


def test_f16_rounds_to_nearest_even_and_refuses_overflow():
    values = np.array([[1 + 2**-11, 1 + 3 * 2**-11, 65519.9, -65519.9, 1e-8, -0.0]], f32)
    packed = pack(values.view(np.uint32), F32, F16, 1).view(np.float16)[0]
    assert packed[:6].tolist() == [1.0, 1 + 2**-9, 65504.0, -65504.0, 0.0, -0.0]
    values[0, 3] = -65520
    with pytest.raises(ValueError, match="65520 is beyond f16"):
        pack(values.view(np.uint32), F32, F16, 1)


@pytest.mark.parametrize("target", [Q8_0, Q4_0], ids=lambda d: d.name)
def test_scales_beyond_f16_are_refused(target):
    values = np.full((1, 32), 3e38, f32)
    with pytest.raises(ValueError, match="too large to quantise"):
        pack(values.view(np.uint32), F32, target, LANES)
