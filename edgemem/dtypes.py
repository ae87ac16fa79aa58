"""Number formats of weights, and how a matrix of them lies in a store.

A matrix of `rows × cols` is stored in groups of `lanes` rows. A group of a float format holds its
elements column by column: (row 0..lanes-1 of column 0), (… of column 1), and so on. A group of a
block format holds a plane of f16 scales, block by block (lanes scales each), and then a plane of
quants in chunks of 4 bytes a row, so that one vector register holds one chunk of every row.
`lanes` is 16 for what kernels multiply and 1 for tables whose rows are gathered one by one.
FORMAT.md draws the bytes.
"""

from dataclasses import dataclass

LANES = 16
BLOCK = 32
"""Elements that share one scale in the block formats."""


@dataclass(frozen=True)
class DType:
    """One number format. A float is a block of one element: `quant_bytes` are its bytes."""

    name: str
    code: int
    block: int
    scale_bytes: int
    quant_bytes: int

    @property
    def is_block(self) -> bool:
        return self.block > 1


F32 = DType("f32", 0, 1, 0, 4)
F16 = DType("f16", 1, 1, 0, 2)
BF16 = DType("bf16", 2, 1, 0, 2)
Q8_0 = DType("q8_0", 3, BLOCK, 2, 32)
Q4_0 = DType("q4_0", 4, BLOCK, 2, 16)

U32 = DType("u32", -1, 1, 0, 4)
"""Not of weights: the checksums of rows."""

BY_NAME = {d.name: d for d in (F32, F16, BF16, Q8_0, Q4_0)}
BY_CODE = {d.code: d for d in BY_NAME.values()}

KV_TYPES = (F16.name, Q8_0.name, F32.name)
"""Those of the KV cache (kvcache.py), the default first."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def scale_plane_bytes(dtype: DType, cols: int, lanes: int) -> int:
    """Bytes of one group's plane of scales, padded so that the quants after it stay aligned."""
    blocks = -(-cols // dtype.block)
    return round_up(blocks * dtype.scale_bytes * lanes, 4 * lanes)


def group_bytes(dtype: DType, cols: int, lanes: int) -> int:
    """Bytes of one group of `lanes` rows; a multiple of 4 · lanes."""
    blocks = -(-cols // dtype.block)
    quants = round_up(blocks * dtype.quant_bytes * lanes, 4 * lanes)
    return scale_plane_bytes(dtype, cols, lanes) + quants


def matrix_bytes(dtype: DType, rows: int, cols: int, lanes: int = LANES) -> int:
    """Bytes of a whole matrix; rows are padded to a multiple of `lanes`, columns to the block."""
    return -(-rows // lanes) * group_bytes(dtype, cols, lanes)
