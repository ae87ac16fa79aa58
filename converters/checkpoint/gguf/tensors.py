"""One GGUF file: its list of tensors checked in full, its tensors read row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from edgemem.dtypes import BY_NAME, DType
from edgemem.errors import UnsupportedError
from edgemem.spec import MAX_DIM

from ..tensors import Tensor, TensorFile
from .header import Header, TensorInfo, parse_header

TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
"""ggml's types that files hold (enum ggml_type in ggml.h): code → name, elements and bytes of a
block."""

DTYPES = {name.upper(): dtype for name, dtype in BY_NAME.items()}
"""The types whose values can be taken over as they are."""


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """A tensor of a GGUF file; `shape` is in the usual order, the fastest axis last.

    `heads` is 0, or the number of heads whose rows llama.cpp interleaved: it stores row i of the
    first half of a head and row i of the second half as rows 2·i and 2·i + 1 (`permute` in
    convert_hf_to_gguf.py), so that pairs that rotate together are neighbours. Rows are given in the
    order of the original checkpoint.
    """

    heads: int = 0

    @property
    def row_bytes(self) -> int:
        return self.bytes // math.prod(self.shape[:-1])

    @property
    def dtype(self) -> DType:
        """Raises UnsupportedError for a type that a store cannot hold."""
        if self.type_name not in DTYPES:
            raise UnsupportedError(
                f"reading {self.file.path}: tensor {self.name} is of type {self.type_name}; "
                f"supported are {', '.join(DTYPES)}: fetch the model in one of these"
            )
        return DTYPES[self.type_name]

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Rows as they lie in the file: raw bits of floats, or uint8 [count, row_bytes] of blocks.

        Raises CheckpointError where the file ends early or cannot be read.
        """
        if self.heads and len(self.shape) == 1:
            assert (first, count) == (0, 1)
            return self._read(0, 1)[:, self._order]
        if not self.heads:
            return self._read(first, count)
        size = len(self._order)
        start = first // size * size
        stop = -(-(first + count) // size) * size
        whole = self._read(start, stop - start).reshape(-1, size, self._row_items)
        return whole[:, self._order].reshape(stop - start, -1)[first - start :][:count]

    @cached_property
    def _order(self) -> np.ndarray:
        """Where each of a head's rows lies among them; of a vector, each of its elements."""
        size = self.shape[0] // self.heads
        order = np.arange(size).reshape(-1, 2).T.reshape(-1)
        if len(self.shape) > 1:
            return order
        return (np.arange(self.heads)[:, None] * size + order).reshape(-1)

    @property
    def _row_items(self) -> int:
        return self.row_bytes if self.dtype.is_block else self.shape[-1]

    def _read(self, first: int, count: int) -> np.ndarray:
        assert first >= 0 and (first + count) * self.row_bytes <= self.bytes
        data = self.file.read(self.offset + first * self.row_bytes, count * self.row_bytes)
        bits = np.uint8 if self.dtype.is_block else f"<u{self.dtype.quant_bytes}"
        return np.frombuffer(data, bits).reshape(count, -1)


class GgufFile(TensorFile):
    """An open GGUF file; `tensors` by name, `metadata` by key. Several threads may read at once."""

    def __init__(self, path: Path):
        self.metadata: dict[str, object] = {}
        super().__init__(path)

    def _parse(self) -> dict[str, Tensor]:
        header = parse_header(self.read, self._size, self._error)
        self.metadata = header.metadata
        tensors: dict[str, Tensor] = {}
        for info in header.tensors:
            if info.name in tensors:
                raise self._error(f"tensor {info.name!r:.200} is in it twice")
            tensors[info.name] = self._tensor_at(info, header)
        self._check_overlaps(list(tensors.values()))
        return tensors

    def _tensor_at(self, info: TensorInfo, header: Header) -> GgufTensor:
        """One entry of the list, held to its type and to the file."""
        what = f"tensor {info.name!r:.200}"
        if info.type_code not in TYPES:
            raise UnsupportedError(
                f"reading {self.path}: {what} is of type {info.type_code}, which is not known; "
                f"supported are {', '.join(DTYPES)}"
            )
        name, block, block_bytes = TYPES[info.type_code]
        cols = info.dims[0]
        if not all(1 <= d <= MAX_DIM for d in info.dims) or cols % block:
            raise self._error(f"{what} of type {name} has the dimensions {list(info.dims)}")
        if block > 1 and len(info.dims) == 1:
            raise UnsupportedError(
                f"reading {self.path}: {what} is a vector of type {name}; vectors are supported in "
                "F32, F16 and BF16, which is what llama.cpp's converters write"
            )
        row_bytes = cols // block * block_bytes
        size = math.prod(info.dims[1:]) * row_bytes
        start = header.data_start + info.offset
        if info.offset % header.alignment or start + size > self._size:
            raise self._error(
                f"{what} of {size} bytes at byte {start} is not aligned, or lies beyond the "
                f"file's {self._size} bytes: fetch it again"
            )
        return GgufTensor(info.name, name, info.dims[::-1], start, size, self)

    def _check_overlaps(self, tensors: list[Tensor]) -> None:
        end = 0
        for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
            if tensor.offset < end:
                raise self._error(f"tensor {tensor.name!r:.200} overlaps the one before it")
            end = tensor.offset + tensor.bytes
