"""GGML's blocks of quants: into the order of a store as they are, or into numbers.

A row of a GGUF tensor is a run of blocks of 32 columns (ggml-common.h, little endian):

    block_q8_0, 34 bytes: f16 scale, 32 × i8            weight k = scale · quant k
    block_q4_0, 18 bytes: f16 scale, 16 × u8            low nibble of byte k: 8 + quant of column k,
                                                        high nibble: 8 + quant of column k + 16

A store's chunk of 4 bytes a lane holds the same bytes of the same columns (`edgemem/FORMAT.md`), so
taking a tensor over is one transposition of 4-byte words; q8_0 adds 128 to each quant.
"""

import numpy as np

from edgemem.dtypes import BLOCK, F32, Q8_0, DType, group_bytes, scale_plane_bytes

from . import quantize

_CHUNK_BYTES = 4
_TILE_BYTES = 1 << 20
"""Rows turned into numbers at a time, so that their f32 copies stay small."""


def block_bytes(dtype: DType) -> int:
    """Bytes of one of GGML's blocks."""
    return dtype.scale_bytes + dtype.quant_bytes


def pack(rows: np.ndarray, source: DType, target: DType, lanes: int) -> np.ndarray:
    """Groups of `lanes` rows as uint8 [ceil(rows / lanes), group_bytes], last group padded.

    `rows` uint8 [rows, row_bytes] holds GGML's blocks of format `source`. With another `target`
    they are turned into numbers and packed as those. Raises ValueError as `quantize.pack` does.
    """
    if source == target:
        return _reorder(rows, source, lanes)
    step = max(1, _TILE_BYTES // (rows.shape[1] * lanes)) * lanes
    tiles = (rows[first : first + step] for first in range(0, len(rows), step))
    packed = [
        quantize.pack(dequantize(tile, source).view(np.uint32), F32, target, lanes)
        for tile in tiles
    ]
    return np.concatenate(packed)


def dequantize(rows: np.ndarray, dtype: DType) -> np.ndarray:
    """float32 [rows, cols]: the values of GGML's blocks, as dequantize_row_q*_0 computes them."""
    scales, quants = _split(rows, dtype)
    quants = quants.view(np.uint8).reshape(*scales.shape, -1)
    if dtype == Q8_0:
        numbers = quants.view(np.int8).astype(np.float32)
    else:
        nibbles = np.concatenate([quants & np.uint8(15), quants >> np.uint8(4)], axis=-1)
        numbers = nibbles.astype(np.float32) - np.float32(8)
    with np.errstate(invalid="ignore"):
        numbers *= scales.view(np.float16).astype(np.float32)[..., None]
    return numbers.reshape(len(rows), -1)


def _split(rows: np.ndarray, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """uint16 scales [rows, blocks] and uint32 quants [rows, blocks, chunks], copied."""
    block = _block(dtype)
    blocks = rows.reshape(len(rows), -1).view(block)
    return np.ascontiguousarray(blocks["scale"]), np.ascontiguousarray(blocks["quants"])


def _block(dtype: DType) -> np.dtype:
    chunks = dtype.quant_bytes // _CHUNK_BYTES
    return np.dtype([("scale", "<u2"), ("quants", "<u4", (chunks,))])


def _reorder(rows: np.ndarray, dtype: DType, lanes: int) -> np.ndarray:
    blocks = rows.view(_block(dtype))
    n_rows, n_blocks = blocks.shape
    cols, whole = n_blocks * BLOCK, n_rows // lanes
    plane = scale_plane_bytes(dtype, cols, lanes)
    packed = np.empty((-(-n_rows // lanes), group_bytes(dtype, cols, lanes)), np.uint8)
    _transpose(blocks[: whole * lanes], lanes, packed[:whole], plane)
    if whole * lanes < n_rows:
        last = np.zeros((lanes, n_blocks), blocks.dtype)
        if dtype != Q8_0:
            last["quants"] = 0x88888888
        last[: n_rows - whole * lanes] = blocks[whole * lanes :]
        _transpose(last, lanes, packed[whole:], plane)
    if dtype == Q8_0:
        quants = packed[:, plane:]
        np.bitwise_xor(quants, np.uint8(0x80), out=quants)
    return packed


def _transpose(blocks: np.ndarray, lanes: int, out: np.ndarray, plane: int) -> None:
    """Whole groups of rows, lane after lane within a block and within a chunk."""
    groups, n_blocks = len(out), blocks.shape[1]
    if groups == 0:
        return
    scales = blocks["scale"].reshape(groups, lanes, n_blocks)
    quantize.check_finite(scales, quantize.F16)
    head = out[:, :plane].view(np.uint16)
    head[:, n_blocks * lanes :] = 0
    head = head[:, : n_blocks * lanes].reshape(groups, n_blocks, lanes)
    head[...] = scales.transpose(0, 2, 1)
    quants = blocks["quants"].reshape(groups, lanes, n_blocks, -1)
    body = out[:, plane:].view(np.uint32).reshape(groups, n_blocks, -1, lanes)
    body[...] = quants.transpose(0, 2, 3, 1)
