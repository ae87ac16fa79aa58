"""FFNs taken apart: row i of what becomes their neurons is up's row i and down's column i.

Blocks of a quantised tensor run across down's columns, so that only floats can be turned around.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from edgemem._native import crc32c
from edgemem.dtypes import F32, GGUF_BLOCKS, DType
from edgemem.errors import CheckpointError
from edgemem.format import Kind, Part, Segment, bundle_parts
from edgemem.spec import ModelSpec

from . import naming, quantize
from .checkpoint import Tensor

_CHUNK_ELEMENTS = 2 << 20


@dataclass(frozen=True)
class NeuronsPiece:
    """The rows of all neurons of a layer. `up` is None where it decides which are active."""

    segment: Segment
    up: tuple[Tensor, naming.Source] | None
    down: tuple[Tensor, naming.Source]

    def chunks(self) -> Iterator[Chunk]:
        """Some neurons at a time, in order."""
        rows, step = self.segment.rows, max(1, _CHUNK_ELEMENTS // self.segment.cols)
        return (Chunk(self, first, min(step, rows - first)) for first in range(0, rows, step))


@dataclass(frozen=True)
class Chunk:
    """Neurons [first, first + count)."""

    piece: NeuronsPiece
    first: int
    count: int

    @property
    def source_bytes(self) -> int:
        tensors = [part[0] for part in (self.piece.up, self.piece.down) if part is not None]
        rows = self.piece.segment.rows
        return sum(t.shape[-1] * t.shape[-2] // rows * _item(t) for t in tensors) * self.count

    def pack(self) -> np.ndarray:
        """uint8 [count, row bytes]."""
        segment, (down, source) = self.piece.segment, self.piece.down
        if source.transposed:
            parts = [(down, down.read_rows(self.first, self.count))]
        else:
            where = source.first_row, source.shape[-2], self.first, self.count
            parts = [(down, naming.read_columns(down, *where))]
        if self.piece.up is not None:
            up, where = self.piece.up
            parts.insert(0, (up, where.read(up, self.first, self.count)[0]))
        tensor = parts[-1][0]
        try:
            formats = {t.dtype for t, _ in parts}
            common = tensor.dtype if len(formats) == 1 else F32
            for tensor, bits in parts:
                quantize.check_finite(bits, tensor.dtype)
            bits = [quantize.to_float(b, t.dtype, common) for t, b in parts]
            return quantize.pack(np.concatenate(bits, axis=1), common, segment.dtype, 1)
        except ValueError as error:
            raise CheckpointError(f"converting tensor {tensor.name}: {error}") from None


def _item(tensor: Tensor) -> int:
    return quantize.BITS[tensor.dtype].itemsize


def taken_apart(spec: ModelSpec) -> ModelSpec:
    """The spec of the same model with FFNs taken apart. Where no neuron rests of itself it has
    thresholds, at first such that none does."""
    thresholds = () if spec.rests else (0.0,) * spec.n_layers
    return replace(spec, neurons=True, thresholds=thresholds)


def plain_parts(spec: ModelSpec, layer: int) -> dict[str, Part]:
    """The segments that a layer's FFN has where it is not taken apart, by name."""
    whole = bundle_parts(replace(spec, neurons=False, thresholds=()), Kind.FFN, layer)
    return {part.name: part for part in whole}


def format_of(tensors: list[Tensor], target: DType | None) -> DType:
    """The number format of rows made of these: as asked, or one that holds them all."""
    formats = {tensor.dtype for tensor in tensors}
    return target or (formats.pop() if len(formats) == 1 else F32)


def obstacle(spec: ModelSpec, tensors: list[Tensor], target: DType | None) -> str | None:
    """Why an FFN of these tensors cannot be taken apart; None if it can."""
    if all(spec.routed):
        return "all layers have experts; only FFNs that every token takes are taken apart"
    block = next((t for t in tensors if t.dtype.is_block), None)
    if block is not None:
        return f"tensor {block.name} is in blocks of {block.dtype.name}, which lie across neurons"
    if target in GGUF_BLOCKS:
        return (
            f"neurons are read row by row, which {target.name} is not made for; choose q8_0 or q4_0"
        )
    if target is not None and spec.hidden % target.block:
        return f"rows of {spec.hidden} are not whole blocks of {target.name}"
    return None


def checksums(rows: np.ndarray) -> np.ndarray:
    """crc32c of each row, uint32 [n]."""
    return np.array([crc32c(row) for row in rows], np.uint32)
