"""Rows of GGML's blocks in every format, also in those that the `gguf` package only reads."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

_SCALES = {
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2),
    Type.Q6_K: (208,), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,),
}  # fmt: skip
"""Where a block's scale lies, and the scale of its minima."""
_MEAN_QUANT = {Type.Q2_K: 1.5, Type.Q4_K: 7.5, Type.Q5_K: 15.5}


def quantized(values: np.ndarray, kind: Type) -> np.ndarray:
    """Float32 [..., cols] as uint8 [..., row_bytes] (floats as what they are): near the values
    where the package can do that, else random blocks whose values are about as large."""
    if kind not in _SCALES:
        return gguf.quants.quantize(values, kind)
    return random_blocks(values.shape, kind, float(values.std()))


def random_blocks(shape: tuple[int, ...], kind: Type, size: float) -> np.ndarray:
    """Blocks of random bytes whose values have about this standard deviation, and a mean of 0."""
    block, count = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng([int(kind), *shape])
    rows = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * count), np.uint8)
    blocks = rows.reshape(-1, count)
    scales = rng.uniform(0.5, 1.5, len(blocks))

    def put(factor: float) -> None:
        for at, times in zip(_SCALES[kind], (1, _MEAN_QUANT.get(kind))):
            some = (factor * times * scales).astype(np.float16)
            blocks[:, at : at + 2] = some.view(np.uint8).reshape(-1, 2)

    put(1.0)
    put(size / float(gguf.quants.dequantize(rows[..., : 64 * count], kind).std()))
    return rows
