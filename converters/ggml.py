"""GGML's blocks (ggml-common.h, little endian): what they consist of, and making them."""

from collections.abc import Callable

import numpy as np

from edgemem import dtypes
from edgemem.dtypes import DType

_D, _MIN = ("d", "<u2"), ("min", "<u2")
FIELDS = {
    dtype: np.dtype(fields)
    for dtype, fields in {
        dtypes.Q8_0: [_D, ("quants", "<u4", 8)],
        dtypes.Q4_0: [_D, ("quants", "<u4", 4)],
        dtypes.Q4_1: [_D, _MIN, ("quants", "<u4", 4)],
        dtypes.Q5_0: [_D, ("high", "u1", 4), ("quants", "<u4", 4)],
        dtypes.Q5_1: [_D, _MIN, ("high", "u1", 4), ("quants", "<u4", 4)],
        dtypes.Q2_K: [("scales", "<u4", 4), ("quants", "u1", 64), _D, _MIN],
        dtypes.Q3_K: [("high", "u1", 32), ("quants", "u1", 64), ("scales", "u1", 12), _D],
        dtypes.Q4_K: [_D, _MIN, ("scales", "u1", 12), ("quants", "u1", 128)],
        dtypes.Q5_K: [_D, _MIN, ("scales", "u1", 12), ("high", "u1", 32), ("quants", "u1", 128)],
        dtypes.Q6_K: [("quants", "u1", 128), ("high", "u1", 64), ("scales", "u1", 16), _D],
        dtypes.IQ4_NL: [_D, ("quants", "<u4", 4)],
        dtypes.IQ4_XS: [_D, ("top", "<u2"), ("scales", "<u4", (1,)), ("quants", "<u4", 32)],
        dtypes.MXFP4: [("e", "u1"), ("quants", "<u4", 4)],
    }.items()
}
"""As structured numpy types."""


def block_bytes(dtype: DType) -> int:
    """Bytes of one of GGML's blocks."""
    return dtype.scale_bytes + dtype.quant_bytes


def made(
    dtype: DType, d: np.ndarray, m: np.ndarray, scales: np.ndarray, minima: np.ndarray,
    quants: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """`FIELDS` [blocks] of f16 d and m [blocks], of scales and minima int [blocks, parts] and of
    quants uint8 [blocks, columns], counted from the lowest."""
    out = np.zeros(len(d), FIELDS[dtype])
    out["d"] = d.view(np.uint16)
    if "min" in out.dtype.names:
        out["min"] = m.view(np.uint16)
    if "scales" in out.dtype.names:
        put = out["scales"].view(np.uint8).reshape(len(d), -1)
        put[...] = _SCALES[dtype](scales, minima)
    length, width, length_of_high, width_of_high = _PLANES[dtype]
    put = out["quants"].view(np.uint8).reshape(len(d), -1)
    put[...] = _packed(quants & ((1 << width) - 1), length, width)
    if "high" in out.dtype.names:
        out["high"] = _packed(quants >> width, length_of_high, width_of_high)
    return out


_PLANES = {
    dtypes.Q5_0: (16, 4, 1, 1),
    dtypes.Q2_K: (32, 2, 0, 0),
    dtypes.Q3_K: (32, 2, 32, 1),
    dtypes.Q4_K: (32, 4, 0, 0),
    dtypes.Q5_K: (32, 4, 32, 1),
    dtypes.Q6_K: (64, 4, 32, 2),
}
"""How `quants` and then `high` hold so many bits each: `_packed`."""


def _packed(quants: np.ndarray, length: int, width: int) -> np.ndarray:
    """Bytes [blocks, …] of quants of `width` bits [blocks, columns]: each run of `length` bytes has
    the next so many quants in its low bits, those after them above, and so on."""
    runs = quants.reshape(len(quants), -1, 8 // width, length)
    packed = runs[:, :, 0].copy()
    for i in range(1, 8 // width):
        packed |= runs[:, :, i] << np.uint8(width * i)
    return packed.reshape(len(quants), -1)


def _fours(scales, minima):
    return scales | minima << 4


def _sixes(scales, minima):
    """As get_scale_min_k4 reads them: of the last four of each the high bits lie with the first."""
    first, last = (np.hstack([scales[:, at], minima[:, at]]) for at in (slice(4), slice(4, 8)))
    return np.hstack([first | last >> 4 << 6, last[:, :4] & 15 | (last[:, 4:] & 15) << 4])


def _signed_sixes(scales, minima):
    """As dequantize_row_q3_K reads them: low halves in 8 bytes, high bits in 4."""
    low, high = scales + 32 & 15, scales + 32 >> 4
    high = _packed(high.astype(np.uint8), 4, 2)
    return np.hstack([low[:, :8] | low[:, 8:] << 4, high])


def _bytes(scales, minima):
    return scales & 255


_SCALES: dict[DType, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    dtypes.Q2_K: _fours,
    dtypes.Q3_K: _signed_sixes,
    dtypes.Q4_K: _sixes,
    dtypes.Q5_K: _sixes,
    dtypes.Q6_K: _bytes,
}
"""The bytes of the field `scales`."""
