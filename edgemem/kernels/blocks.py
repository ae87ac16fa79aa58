"""What the bytes of block formats mean, in plain numpy; FORMAT.md draws them."""

from collections.abc import Callable

import numpy as np

from .. import dtypes
from ..dtypes import DType

_NEAR_NORMAL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_NUMBERS = {
    dtypes.Q8_0: np.arange(-128, 128),
    dtypes.Q4_0: np.arange(-8, 8),
    dtypes.Q4_1: np.arange(16),
    dtypes.Q5_0: np.arange(-16, 16),
    dtypes.Q5_1: np.arange(32),
    dtypes.Q2_K: np.arange(4),
    dtypes.Q3_K: np.arange(-4, 4),
    dtypes.Q4_K: np.arange(16),
    dtypes.Q5_K: np.arange(32),
    dtypes.Q6_K: np.arange(-32, 32),
    dtypes.IQ4_NL: np.array(_NEAR_NORMAL),
    dtypes.IQ4_XS: np.array(_NEAR_NORMAL),
    dtypes.MXFP4: np.array(_E2M1),
}
"""What each quant stands for."""


def unpack(groups: np.ndarray, dtype: DType, cols: int, lanes: int) -> np.ndarray:
    """The values of groups uint8 [n, group_bytes], float32 [n, padded cols, lanes]: number · scale,
    which is exact, and where the format has minima the minimum added in one rounding."""
    blocks = -(-cols // dtype.block)
    plane = dtypes.scale_plane_bytes(dtype, cols, lanes)
    item = "<u2" if dtype.scale_bytes > 1 else "u1"
    scales = groups[:, : blocks * lanes * dtype.scale_bytes].copy().view(item)
    scales = scales.reshape(len(groups), blocks, -1, lanes)
    words = groups[:, plane : plane + blocks * lanes * dtype.quant_bytes].copy()
    words = words.reshape(len(groups), blocks, -1, lanes, 4)
    header = words[:, :, : dtype.header_words]
    numbers = _NUMBERS[dtype].astype(np.float32)[_quants(words, dtype)]
    with np.errstate(invalid="ignore", over="ignore"):
        scale, minimum = _SCALES.get(dtype, _f16)(scales, header)
        values = numbers.reshape(*scale.shape[:3], -1, lanes) * scale[..., None, :]
        if minimum is not None:
            values += minimum[..., None, :]
    return values.reshape(len(groups), blocks * dtype.block, lanes)


def _quants(words: np.ndarray, dtype: DType) -> np.ndarray:
    """uint8 [n, blocks, block, lanes], put together from their planes."""
    n, blocks, _, lanes, _ = words.shape
    steps = words[:, :, dtype.header_words :].reshape(n, blocks, -1, sum(dtype.bits), lanes, 4)
    quants, first, below = 0, 0, 0
    for width in dtype.bits:
        plane = steps[:, :, :, first : first + width]
        chunks = [plane >> k & ((1 << width) - 1) for k in range(0, 8, width)]
        quants |= np.concatenate(chunks, axis=3) << below
        first, below = first + width, below + width
    return quants.swapaxes(-1, -2).reshape(n, blocks, dtype.block, lanes)


# ---- scales: of planes [n, blocks, planes, lanes] and header [n, blocks, words, lanes, 4] those
# and the minima (or None) of each 32 or 16 columns, float32 [n, blocks, parts, lanes]


def _halves(plane: np.ndarray) -> np.ndarray:
    return plane.view(np.float16).astype(np.float32)


def _f16(scales, header):
    halves = _halves(scales)
    return halves[:, :, :1], halves[:, :, 1:] if halves.shape[2] > 1 else None


def _power(scales, header):
    """2^(e - 128), which may lie below the normal floats."""
    return np.ldexp(np.float32(1), scales.astype(np.int32) - 128), None


def _words(header: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(header).view("<u4")[..., 0]


def _six_bits(low: np.ndarray, high: np.ndarray, first: int = 0) -> np.ndarray:
    """The 8 numbers whose low 4 bits and high 2 bits two words [n, blocks, lanes] hold."""
    low, high = low.astype(np.uint32), high.astype(np.uint32)
    each = [low >> 4 * s & 15 | (high >> first + 2 * s & 3) << 4 for s in range(8)]
    return np.stack(each, axis=2).astype(np.float32)


def _six_bits_and_minima(scales, header):
    d, dmin = _each(_halves(scales))
    low, low_of_minima, high = _each(_words(header))
    minima = _six_bits(low_of_minima, high, 16) * dmin[:, :, None]
    return _six_bits(low, high) * d[:, :, None], -minima


def _six_bits_of_16(scales, header):
    first, second, high = _each(_words(header))
    both = np.stack([_six_bits(first, high), _six_bits(second, high, 16)], axis=3)
    return (both.reshape(*both.shape[:2], 16, -1) - 32) * _halves(scales), None


def _six_bits_apart(scales, header):
    d, _ = _each(_halves(scales))
    return (_six_bits(_words(header)[:, :, 0], scales[:, :, 1]) - 32) * d[:, :, None], None


def _bytes(header: np.ndarray) -> np.ndarray:
    return header.swapaxes(3, 4).reshape(*header.shape[:2], 16, -1)


def _eight_bits(scales, header):
    return (_bytes(header).astype(np.float32) - 128) * _halves(scales), None


def _four_bits_and_minima(scales, header):
    (d, dmin), both = _each(_halves(scales)), _bytes(header)
    fours = ((both & 15).astype(np.float32), (both >> 4).astype(np.float32))
    return fours[0] * d[:, :, None], -(fours[1] * dmin[:, :, None])


def _each(planes: np.ndarray) -> list[np.ndarray]:
    return [planes[:, :, i] for i in range(planes.shape[2])]


_SCALES: dict[DType, Callable] = {
    dtypes.MXFP4: _power,
    dtypes.Q2_K: _four_bits_and_minima,
    dtypes.Q3_K: _six_bits_of_16,
    dtypes.Q4_K: _six_bits_and_minima,
    dtypes.Q5_K: _six_bits_and_minima,
    dtypes.Q6_K: _eight_bits,
    dtypes.IQ4_XS: _six_bits_apart,
}
"""For those whose scales are not f16 alone."""
