"""From rows of floats to the bytes of a store: floats of any format, q8_0 and q4_0.

Rows come as raw bits (uint16 or uint32, one row of the tensor per row of the array) and leave as
whole groups of `lanes` rows in the order that `edgemem/FORMAT.md` draws. Quantisation is GGML's,
value for value: `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` of ggml-quants.c. Raises
ValueError where a weight is NaN or infinite, or does not fit the target format.
"""

import numpy as np

from edgemem.dtypes import BF16, BLOCK, F16, F32, Q8_0, DType, group_bytes, scale_plane_bytes

BITS = {F32: np.dtype("<u4"), F16: np.dtype("<u2"), BF16: np.dtype("<u2")}
"""What the raw bits of a float format are read as."""

_EXPONENT = {F32: 0x7F800000, F16: 0x7C00, BF16: 0x7F80}
_TILE_ELEMENTS = 1 << 18
"""Elements quantised at a time: their f32 copies stay in a core's cache."""

_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
"""Added before truncation it rounds half away from zero, as C's roundf; 0.5 would round
0.49999997 up, since the sum itself rounds."""


def pack(bits: np.ndarray, source: DType, target: DType, lanes: int) -> np.ndarray:
    """Groups of `lanes` rows as uint8 [ceil(rows / lanes), group_bytes], last group padded.

    `bits` [rows, cols] holds floats of format `source`; `target` is `source`, f32, f16 or a block
    format.
    """
    check_finite(bits, source)
    rows, cols = bits.shape
    size = group_bytes(target, cols, lanes)
    packed = np.empty((-(-rows // lanes), size), np.uint8)
    step = max(1, _TILE_ELEMENTS // (lanes * cols))
    for first in range(0, len(packed), step):
        tile = bits[first * lanes : (first + step) * lanes]
        out = packed[first : first + step]
        if target.is_block:
            _pack_blocks(to_f32(tile, source), target, lanes, out)
        else:
            _pack_floats(to_float(tile, source, target), lanes, out)
    return packed


def check_finite(bits: np.ndarray, dtype: DType) -> None:
    """Raises ValueError where a float is NaN or infinite."""
    if not _all_finite(bits, dtype):
        raise ValueError("it holds NaN or infinite weights")


def _all_finite(bits: np.ndarray, dtype: DType) -> bool:
    """No exponent is all ones; many times faster than isfinite is for f16."""
    mask = BITS[dtype].type(_EXPONENT[dtype])
    return not ((bits & mask) == mask).any()


def to_f32(bits: np.ndarray, source: DType) -> np.ndarray:
    """The values of floats given as raw bits."""
    if source == BF16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float32 if source == F32 else np.float16).astype(np.float32, copy=False)


def to_float(bits: np.ndarray, source: DType, target: DType) -> np.ndarray:
    """Raw bits in another float format, rounded to nearest even; raises ValueError on overflow."""
    if source == target:
        return bits
    values = to_f32(bits, source)
    if target == F32:
        return values.view(np.uint32)
    return _to_f16(values).view(np.uint16)


def _to_f16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not _all_finite(halves.view(np.uint16), F16):
        peak = float(np.abs(values).max())
        raise ValueError(f"a value of {peak:g} is beyond f16 (65504); keep the number format")
    return halves


def _pack_floats(bits: np.ndarray, lanes: int, out: np.ndarray) -> None:
    """Transpose each group: lane after lane within a column."""
    cols = bits.shape[1]
    out = out.view(bits.dtype)
    out[:, cols * lanes :] = 0
    groups = _padded(bits, lanes, cols).reshape(-1, lanes, cols)
    out[:, : cols * lanes].reshape(-1, cols, lanes)[...] = groups.transpose(0, 2, 1)


def _pack_blocks(values: np.ndarray, target: DType, lanes: int, out: np.ndarray) -> None:
    """A plane of scales and a plane of quants for each group; see `pack`."""
    blocks = -(-values.shape[1] // BLOCK)
    values = _padded(values, lanes, blocks * BLOCK).reshape(-1, blocks, BLOCK)
    scales, quants = (quantize_q8_0 if target == Q8_0 else quantize_q4_0)(values)
    plane = scale_plane_bytes(target, blocks * BLOCK, lanes)
    head, body = out[:, :plane].view(np.uint16), out[:, plane:].view(np.uint32)
    head[:, blocks * lanes :] = 0
    scales = scales.view(np.uint16).reshape(-1, lanes, blocks)
    head[:, : blocks * lanes].reshape(-1, blocks, lanes)[...] = scales.transpose(0, 2, 1)
    chunks = quants.reshape(len(values), -1).view(np.uint32).reshape(len(out), lanes, -1)
    body.reshape(len(out), -1, lanes)[...] = chunks.transpose(0, 2, 1)


def _padded(rows: np.ndarray, lanes: int, cols: int) -> np.ndarray:
    """The rows with zeros added up to a multiple of `lanes` rows, and to `cols` columns."""
    count = -(-len(rows) // lanes) * lanes
    if rows.shape == (count, cols):
        return rows
    padded = np.zeros((count, cols), rows.dtype)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded


def quantize_q8_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [rows, blocks, 32] → f16 scales [rows, blocks], uint8 quants + 128 [rows, blocks, 32]."""
    magnitudes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    scales = magnitudes.max(axis=-1).view(np.float32) / np.float32(127)
    scaled = values * _inverse(scales)
    scaled += np.copysign(_BELOW_HALF, scaled)
    return _scales_to_f16(scales), scaled.astype(np.int8).view(np.uint8) ^ np.uint8(128)


def quantize_q4_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [rows, blocks, 32] → f16 scales [rows, blocks], uint8 quant pairs [rows, blocks, 16].

    The scale takes the sign that maps the weight of largest magnitude (the first of them) to -8.
    """
    magnitudes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    peaks = np.take_along_axis(values, magnitudes.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    scales = peaks / np.float32(-8) + np.float32(0)  # the sum turns -0 into 0
    scaled = values * _inverse(scales)
    scaled += np.float32(8.5)
    quants = np.minimum(scaled.astype(np.uint8), np.uint8(15))
    half = BLOCK // 2
    return _scales_to_f16(scales), quants[..., :half] | (quants[..., half:] << np.uint8(4))


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scale [..., 1]; 0 where that overflows, for there the scale is 0 in f16 as well."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    inverse[~np.isfinite(inverse)] = 0
    return inverse[..., None]


def _scales_to_f16(scales: np.ndarray) -> np.ndarray:
    try:
        return _to_f16(scales)
    except ValueError:
        raise ValueError("its weights are too large to quantise; keep the number format") from None
