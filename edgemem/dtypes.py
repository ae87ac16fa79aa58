"""Number formats of weights, and how a matrix of them lies in a store.

A matrix of `rows × cols` is stored in groups of `lanes` rows. A group of a float format holds its
elements column by column: (row 0..lanes-1 of column 0), (… of column 1), and so on. A group of a
block format holds a plane of scales, block by block (lanes scales each), and then all else in words
of 4 bytes a row, so that one vector register holds one word of every row.
`lanes` is 16 for what kernels multiply and 1 for tables whose rows are gathered one by one.
FORMAT.md draws the bytes.
"""

from dataclasses import dataclass

LANES = 16
BLOCK = 32
"""Elements of a block, or of an eighth of one: those that share a scale of activations."""


@dataclass(frozen=True)
class DType:
    """One number format. A float is a block of one element: `quant_bytes` are its bytes. A block's
    are words of scales, if any, and for each 32 columns planes of `bits` bits, whose sum a quant
    has."""

    name: str
    code: int
    block: int
    scale_bytes: int
    quant_bytes: int
    bits: tuple[int, ...] = ()

    @property
    def is_block(self) -> bool:
        return self.block > 1

    @property
    def header_words(self) -> int:
        """Words of 4 bytes of a row's block that come before its quants."""
        return self.quant_bytes // 4 - self.block // BLOCK * sum(self.bits)


F32 = DType("f32", 0, 1, 0, 4)
F16 = DType("f16", 1, 1, 0, 2)
BF16 = DType("bf16", 2, 1, 0, 2)
Q8_0 = DType("q8_0", 3, BLOCK, 2, 32, (8,))
Q4_0 = DType("q4_0", 4, BLOCK, 2, 16, (4,))
Q4_1 = DType("q4_1", 5, BLOCK, 4, 16, (4,))
Q5_0 = DType("q5_0", 6, BLOCK, 2, 20, (4, 1))
Q5_1 = DType("q5_1", 7, BLOCK, 4, 20, (4, 1))
Q2_K = DType("q2_k", 8, 8 * BLOCK, 4, 80, (2,))
Q3_K = DType("q3_k", 9, 8 * BLOCK, 2, 108, (2, 1))
Q4_K = DType("q4_k", 10, 8 * BLOCK, 4, 140, (4,))
Q5_K = DType("q5_k", 11, 8 * BLOCK, 4, 172, (4, 1))
Q6_K = DType("q6_k", 12, 8 * BLOCK, 2, 208, (4, 2))
IQ4_NL = DType("iq4_nl", 13, BLOCK, 2, 16, (4,))
IQ4_XS = DType("iq4_xs", 14, 8 * BLOCK, 4, 132, (4,))
MXFP4 = DType("mxfp4", 15, BLOCK, 1, 16, (4,))

U32 = DType("u32", -1, 1, 0, 4)
"""Not of weights: the checksums of rows."""

GGUF_BLOCKS = (Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4)
"""Those of GGUF files; rows of neurons are not in them."""

BY_NAME = {d.name: d for d in (F32, F16, BF16, Q8_0, Q4_0, *GGUF_BLOCKS)}
BY_CODE = {d.code: d for d in BY_NAME.values()}

CONVERSIONS = ("keep", "f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k")
"""What the matrices of a checkpoint may become; "keep" leaves them what they are."""

MULTIPLIED = (F32, F16, BF16, Q8_0, Q4_0)
"""Formats that processors multiply at paces of their own; all other blocks are unpacked and
multiplied as q4_0 is."""

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
