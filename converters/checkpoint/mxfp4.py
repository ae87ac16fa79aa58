"""MXFP4 as safetensors hold it: a tensor of blocks and one of their scales, taken for one tensor.

Blocks of 32 numbers are 16 bytes, of which byte i has number 2·i in its low half and 2·i + 1 in its
high one; a scale is a byte (transformers' integrations/mxfp4.py, OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemem.dtypes import BLOCK, MXFP4, DType
from edgemem.errors import CheckpointError

from .tensors import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = BLOCK // 2


@dataclass(frozen=True)
class Mxfp4Tensor(Tensor):
    """Named as its blocks are; `shape` counts numbers, not blocks."""

    scales: Tensor

    @property
    def dtype(self) -> DType:
        return MXFP4

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // BLOCK * (1 + _BYTES)

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Rows of GGML's blocks, uint8 [count, row_bytes]: a scale, and then 16 bytes of which byte
        i has number i in its low half and i + 16 in its high one."""
        n = self.shape[-1] // BLOCK
        assert first >= 0 and (first + count) * n <= self.scales.bytes
        found = np.empty(count * n, [("scale", "u1"), ("numbers", f"V{_BYTES}")])
        scales = self.scales.file.read(self.scales.offset + first * n, count * n)
        found["scale"] = np.frombuffer(scales, np.uint8)
        blocks = self.file.read(self.offset + first * n * _BYTES, count * n * _BYTES)
        found["numbers"] = _reordered(np.frombuffer(blocks, "<u8")).view(f"V{_BYTES}")
        return found.view(np.uint8).reshape(count, -1)


def _reordered(words: np.ndarray) -> np.ndarray:
    """Blocks, two words of 8 bytes each, in GGML's order, whose bytes 2·i and 2·i + 1 are the low
    and the high halves of bytes i and i + 8; as uint16."""
    low, first, second = np.uint64(0x0F0F0F0F0F0F0F0F), words[::2], words[1::2]
    even = first & low | (second & low) << np.uint64(4)
    odd = first >> np.uint64(4) & low | second & ~low
    return even.view(np.uint8).astype("<u2") | odd.view(np.uint8).astype("<u2") << 8


def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with blocks and their scales put together.

    Raises CheckpointError for blocks without scales, and for those whose shapes do not agree.
    """
    found = dict(tensors)
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS) or blocks.type_name != "U8":
            continue
        scales = found.pop(name.removesuffix(_BLOCKS) + _SCALES, None)
        if scales is None:
            raise CheckpointError(
                f"reading {blocks.file.path}: tensor {name:.200} comes without its {_SCALES}; "
                "fetch all files of the checkpoint"
            )
        expected = (*scales.shape, _BYTES)
        if scales.type_name != "U8" or blocks.shape != expected or len(expected) < 3:
            raise CheckpointError(
                f"reading {blocks.file.path}: tensor {name:.200} has the shape "
                f"{list(blocks.shape)}, its scales are {scales.type_name} {list(scales.shape)}: "
                f"MXFP4 has {_BYTES} bytes for each scale"
            )
        shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
        size = blocks.bytes + scales.bytes
        found[name] = Mxfp4Tensor(name, "MXFP4", shape, blocks.offset, size, blocks.file, scales)
    return found
