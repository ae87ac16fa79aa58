"""From rows of a checkpoint's tensor to the bytes of a store, whatever the format of either.

A row of a GGUF tensor is a run of blocks of 32 or 256 columns (ggml.py). A store has the same
numbers in the order in which kernels read them (`edgemem/FORMAT.md`): scales in a plane of their
own, the rest as words of 4 bytes. Some formats' quants are such words already, and are only
transposed.
"""

from collections.abc import Callable

import numpy as np

from edgemem import dtypes
from edgemem.dtypes import F32, DType, group_bytes, scale_plane_bytes
from edgemem.kernels.blocks import unpack

from . import kquants, quantize
from .ggml import FIELDS, block_bytes

_TILE_BYTES = 1 << 20
"""Rows turned into numbers at a time, so that their f32 copies stay small."""

_SCALES = ("d", "min", "top", "e")
"""Fields that go into the plane of scales, in this order."""

_PADDING = {dtypes.Q4_0: 0x88888888}
"""Words of rows that are not there, where they are not zero: quants of 0."""

_LARGEST_EXPONENT = 252
"""With more, 12 · 2^(e - 128) is beyond the floats; 255 stands for NaN."""


def pack(rows: np.ndarray, source: DType, target: DType, lanes: int) -> np.ndarray:
    """Groups of `lanes` rows as uint8 [ceil(rows / lanes), group_bytes], last group padded.

    `rows` of format `source` are raw bits of floats [rows, cols], or uint8 [rows, row_bytes] of
    GGML's blocks. Those stay what they are where `target` is the same, else all are turned into
    numbers and packed as that. Raises ValueError where a weight is NaN or infinite, or does not
    fit.
    """
    if source.is_block and source == target:
        return _reorder(rows, source, lanes)
    if not source.is_block and target not in kquants.TARGETS:
        return quantize.pack(rows, source, target, lanes)
    step = max(1, _TILE_BYTES // (rows[0].nbytes * lanes)) * lanes
    tiles = (rows[first : first + step] for first in range(0, len(rows), step))
    return np.concatenate([_requantised(tile, source, target, lanes) for tile in tiles])


def _requantised(rows: np.ndarray, source: DType, target: DType, lanes: int) -> np.ndarray:
    if source.is_block:
        values = dequantize(rows, source)
    else:
        quantize.check_finite(rows, source)
        values = quantize.to_f32(rows, source)
    if target in kquants.TARGETS:
        return _reorder(kquants.quantize(values, target), target, lanes)
    return quantize.pack(values.view(np.uint32), F32, target, lanes)


def dequantize(rows: np.ndarray, dtype: DType) -> np.ndarray:
    """float32 [rows, cols]: the values of GGML's blocks, as its dequantize_row_* compute them."""
    cols = rows.shape[1] // block_bytes(dtype) * dtype.block
    return np.ascontiguousarray(unpack(_reorder(rows, dtype, 1), dtype, cols, 1)[:, :, 0])


def _reorder(rows: np.ndarray, dtype: DType, lanes: int) -> np.ndarray:
    blocks = rows.view(FIELDS[dtype])
    _check_scales(blocks)
    n_rows, n_blocks = blocks.shape
    cols, whole = n_blocks * dtype.block, n_rows // lanes
    scales = [blocks[name] for name in _SCALES if name in blocks.dtype.names]
    words = _WORDS.get(dtype, _as_they_are)(blocks)
    plane = scale_plane_bytes(dtype, cols, lanes)
    packed = np.zeros((-(-n_rows // lanes), group_bytes(dtype, cols, lanes)), np.uint8)
    for at, count in ((slice(0, whole), whole * lanes), (slice(whole, None), n_rows % lanes)):
        if count == 0:
            continue
        some = slice(at.start * lanes, at.start * lanes + count)
        head = packed[at, : n_blocks * dtype.scale_bytes * lanes].view(scales[0].dtype)
        head = head.reshape(-1, n_blocks, len(scales), lanes)
        for i, scale in enumerate(scales):
            head[:, :, i] = _by_group(scale[some], lanes, 0).transpose(0, 2, 1)
        body = packed[at, plane:].view(np.uint32).reshape(len(head), n_blocks, -1, lanes)
        groups = _by_group(words[some], lanes, _PADDING.get(dtype, 0))
        body[...] = groups.transpose(0, 2, 3, 1)
        if dtype == dtypes.Q8_0:
            body ^= np.uint32(0x80808080)
    return packed


def _by_group(rows: np.ndarray, lanes: int, padding: int) -> np.ndarray:
    """[groups, lanes, …] of rows [n, …]; one group may lack some."""
    if len(rows) % lanes:
        whole = np.full((lanes, *rows.shape[1:]), padding, rows.dtype)
        whole[: len(rows)] = rows
        rows = whole
    return rows.reshape(-1, lanes, *rows.shape[1:])


def _check_scales(blocks: np.ndarray) -> None:
    for name in ("d", "min"):
        if name in blocks.dtype.names:
            quantize.check_finite(blocks[name], dtypes.F16)
    if "e" in blocks.dtype.names and blocks["e"].max() > _LARGEST_EXPONENT:
        raise ValueError("it holds NaN or infinite weights")


# ---- words of a block: scales if any, then for each 32 columns the planes of their quants ------


def _as_they_are(blocks: np.ndarray) -> np.ndarray:
    return blocks["quants"]


def _q5(blocks):
    bits = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    high = _plane(bits.view("<u4"), 1)[..., 0]
    return np.concatenate([blocks["quants"], high], axis=-1)


def _q2_k(blocks):
    return _joined(blocks["scales"], _plane(_fields(_runs(blocks["quants"], 32), 2, 4), 2))


def _q3_k(blocks):
    """Its 6-bit scales lie as in dequantize_row_q3_K: low halves in 8 bytes, high bits in 4."""
    low, high = blocks["scales"][..., :8], blocks["scales"][..., 8:]
    low = _fields(_runs(low, 8), 4, 2).view(np.uint8).reshape(*low.shape[:2], 8, 2)
    high = _fields(_runs(high, 4), 2, 4).view(np.uint8).reshape(*high.shape[:2], 8, 2)
    scales = [_word(low[..., 0], 4), _word(low[..., 1], 4)]
    scales.append(_word(high[..., 0], 2) | _word(high[..., 1], 2) << np.uint32(16))
    quants = _fields(_runs(blocks["quants"], 32), 2, 4)
    bits = _fields(_runs(blocks["high"], 32), 1, 8)
    return _joined(np.stack(scales, axis=-1), _plane(quants, 2), _plane(bits, 1))


def _q4_k(blocks):
    quants = _fields(_runs(blocks["quants"], 32), 4, 2)
    return _joined(_scales_and_minima(blocks), _plane(quants, 4))


def _q5_k(blocks):
    quants = _fields(_runs(blocks["quants"], 32), 4, 2)
    bits = _fields(_runs(blocks["high"], 32), 1, 8)
    return _joined(_scales_and_minima(blocks), _plane(quants, 4), _plane(bits, 1))


def _scales_and_minima(blocks):
    """As get_scale_min_k4: of the last four scales and minima the high bits lie with the first."""
    first, minima, last = np.split(blocks["scales"], 3, axis=-1)
    scales = np.concatenate([first & 63, last & 15 | first >> 2 & 0x30], axis=-1)
    minima = np.concatenate([minima & 63, last >> 4 | minima >> 2 & 0x30], axis=-1)
    high = _word(scales >> 4, 2) | _word(minima >> 4, 2) << np.uint32(16)
    return np.stack([_word(scales & 15, 4), _word(minima & 15, 4), high], axis=-1)


def _q6_k(blocks):
    scales = (blocks["scales"] ^ np.uint8(0x80)).view("<u4")
    quants = _fields(_runs(blocks["quants"], 64), 4, 2)
    high = _fields(_runs(blocks["high"], 32), 2, 4)
    return _joined(scales, _plane(quants, 4), _plane(high, 2))


def _iq4_xs(blocks):
    return np.concatenate([blocks["scales"], blocks["quants"]], axis=-1)


_WORDS: dict[DType, Callable[[np.ndarray], np.ndarray]] = {
    dtypes.Q5_0: _q5,
    dtypes.Q5_1: _q5,
    dtypes.Q2_K: _q2_k,
    dtypes.Q3_K: _q3_k,
    dtypes.Q4_K: _q4_k,
    dtypes.Q5_K: _q5_k,
    dtypes.Q6_K: _q6_k,
    dtypes.IQ4_XS: _iq4_xs,
}
"""uint32 [rows, blocks, words] of structured blocks [rows, blocks]."""


def _runs(items: np.ndarray, length: int) -> np.ndarray:
    """uint32 [..., n, length / 4] of bytes: four are handled at a time."""
    words = np.ascontiguousarray(items).view("<u4")
    return words.reshape(*items.shape[:-1], -1, length // 4)


def _fields(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """Each byte's fields of so many bits as bytes, the low ones first: [..., n, count, length]."""
    shifts = np.arange(0, width * count, width, dtype=np.uint32)[:, None]
    return words[..., None, :] >> shifts & np.uint32(((1 << width) - 1) * 0x01010101)


def _plane(quants: np.ndarray, width: int) -> np.ndarray:
    """Words [rows, blocks, steps, width] of quants of so many bits [rows, blocks, …]: FORMAT.md."""
    chunks = quants.reshape(*quants.shape[:2], -1, 8 // width, width)
    packed = chunks[..., 0, :].copy()
    for k in range(1, 8 // width):
        packed |= chunks[..., k, :] << np.uint32(width * k)
    return packed


def _word(numbers: np.ndarray, width: int) -> np.ndarray:
    """uint32 [...] of 8 numbers [..., 8], one every so many bits."""
    shifts = np.arange(0, 8 * width, width, dtype=np.uint32)
    return np.bitwise_or.reduce(numbers.astype(np.uint32) << shifts, axis=-1)


def _joined(header: np.ndarray, *planes: np.ndarray) -> np.ndarray:
    """A block's words: the header's, and of each step all planes'."""
    steps = np.concatenate(planes, axis=-1)
    return np.concatenate([header, steps.reshape(*steps.shape[:2], -1)], axis=-1)
