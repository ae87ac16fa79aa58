"""Random matrices of every number format in memory, as stores hold them."""

import numpy as np
from boundaries import DIMENSIONS

from edgemem import dtypes
from edgemem._native import Slab
from edgemem.dtypes import DType
from edgemem.format import Layout
from edgemem.kernels import reference


def floats(rng, *shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)


def columns(dtype: DType, cols: int = 0) -> tuple[int, ...]:
    """How long a format's rows may be: as `cols` or up to the next whole block, or all lengths that
    matter."""
    if dtype.block > dtypes.BLOCK:
        return (dtypes.round_up(cols, dtype.block),) if cols else (dtype.block, 3 * dtype.block)
    return (cols,) if cols else DIMENSIONS


def packed_matrix(rng, dtype: DType, rows: int, cols: int, lanes: int = dtypes.LANES) -> bytes:
    """Random store bytes of one matrix. Padding is as random as the rest: it must not matter."""
    size = dtypes.group_bytes(dtype, cols, lanes)
    groups = rng.integers(0, 256, (-(-rows // lanes), size), np.uint8)
    plane = dtypes.scale_plane_bytes(dtype, cols, lanes) if dtype.is_block else size
    count = len(groups) * plane // (4 if dtype is dtypes.F32 else 2)
    values = floats(rng, count) * np.float32(0.05 if dtype.is_block else 1)
    if dtype is dtypes.BF16:
        head = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        head = values.astype(np.float32 if dtype is dtypes.F32 else np.float16)
    groups[:, :plane] = head.view(np.uint8).reshape(len(groups), plane)
    if dtype is dtypes.MXFP4:
        groups[:, :plane] = rng.integers(110, 126, (len(groups), plane))
    return groups.tobytes()


def minima(data: bytes, dtype: DType, rows: int, cols: int, lanes: int) -> np.ndarray:
    """What a block format adds: the values where all quants are zero."""
    if dtype not in (dtypes.Q4_1, dtypes.Q5_1, dtypes.Q2_K, dtypes.Q4_K, dtypes.Q5_K):
        return np.zeros((rows, cols))
    groups = np.frombuffer(data, np.uint8).reshape(-1, dtypes.group_bytes(dtype, cols, lanes))
    groups, plane = groups.copy(), dtypes.scale_plane_bytes(dtype, cols, lanes)
    words = groups[:, plane:].reshape(len(groups), -1, dtype.quant_bytes // 4, 4 * lanes)
    words[:, :, dtype.header_words :] = 0
    return reference.unpack(groups.tobytes(), dtype, rows, cols, lanes)


class Bundle:
    """Random segments in aligned memory: `address` for kernels, `values` for the judge, and in
    `sizes` the magnitudes of what values are sums of."""

    def __init__(self, rng, shapes):
        """shapes: (name, dtype, lanes, rows, cols) each."""
        self.layout = Layout.build(shapes)
        self.slab = Slab(self.layout.payload_bytes)
        self.address = self.slab.address
        self.values, self.sizes = {}, {}
        for s in self.layout.segments:
            data = packed_matrix(rng, s.dtype, s.rows, s.cols, s.lanes)
            self.slab.view[s.offset : s.end] = data
            form = s.dtype, s.rows, s.cols, s.lanes
            values, added = reference.unpack(data, *form), minima(data, *form)
            self.values[s.name] = values
            self.sizes[s.name] = np.abs(values - added) + np.abs(added)
