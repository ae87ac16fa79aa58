"""Where a model's segments are found in a checkpoint: names of tensors, and rows within them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edgemem.dtypes import F32, DType
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from . import quantize
from .checkpoint import Tensor

EMBED, HEAD = "embed_tokens.weight", ("lm_head.weight",)
PREFIXES = ("model.", "")
"""Names as causal language models save them, or as the bare model inside them does."""

_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.(attn|attention)\.(masked_)?bias")
"""Tensors that old checkpoints carry, and that are computed from the config, or are masks."""

_DENSE = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "shared_gate": "mlp.shared_expert_gate.weight",
}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_MOE_BLOCKS = ("mlp", "block_sparse_moe")
"""What holds the experts: transformers 5 renames Mixtral's on loading; files have either."""


@dataclass(frozen=True)
class Source:
    """Rows of a tensor that become a segment: `first_row` counts with leading axes taken as one.

    They follow each other, or come in runs of `run` rows, each starting `stride` after the last, in
    their order or in that of `order`, which says where in its run each row lies; or are every
    `step`-th. Of a vector they are elements; with `items` so many elements of the tensor, whatever
    its axes. With `transposed` they are columns of the tensor, counted on through its matrices.
    `plus` is added to all, in 32 bits: norms whose weight counts from 1.
    """

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    run: int = 0
    stride: int = 0
    items: int = 0
    transposed: bool = False
    plus: float = 0.0
    step: int = 1
    order: tuple[int, ...] = ()

    def dtype(self, tensor: Tensor) -> DType:
        """The number format of what `read` gives."""
        return F32 if self.plus else tensor.dtype

    def spans(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) in the tensor of the segment's rows [first, first + count), which are
        every `step`-th of those."""
        if self.step > 1 and count > 0:
            yield self.first_row + first * self.step, (count - 1) * self.step + 1
            return
        while count > 0:
            turn, at = divmod(first, self.run) if self.run else (0, first)
            rows = min(count, self.run - at) if self.run else count
            if self.order:
                at, rows = self.order[at], 1
            yield self.first_row + turn * self.stride + at, rows
            first, count = first + rows, count - rows

    def read(self, tensor: Tensor, first: int, count: int) -> tuple[np.ndarray, DType]:
        """Raw bits [count, cols] of the segment's rows [first, first + count), and their format."""
        vector = self.items or len(self.shape) == 1
        read = _elements if vector else _columns if self.transposed else _rows
        spans = self.spans(0, self.items or self.shape[0]) if vector else self.spans(first, count)
        parts = [read(tensor, *span)[:: self.step] for span in spans]
        bits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        bits = bits.reshape(1, -1) if vector else bits
        if not self.plus:
            return bits, tensor.dtype
        values = quantize.to_f32(bits, tensor.dtype) + np.float32(self.plus)
        return values.view(np.uint32), F32


def _rows(tensor: Tensor, first: int, count: int) -> np.ndarray:
    return tensor.read_rows(first, count)


def _elements(tensor: Tensor, first: int, count: int) -> np.ndarray:
    """Elements of a tensor of floats, with all its axes taken as one: raw bits [count]."""
    cols = tensor.shape[-1]
    row, at = divmod(first, cols)
    rows = tensor.read_rows(row, -(-(at + count) // cols))
    return rows.reshape(-1)[at : at + count]


def _columns(tensor: Tensor, first: int, count: int) -> np.ndarray:
    """Columns of one of a tensor's matrices, as rows."""
    rows, cols = tensor.shape[-2:]
    matrix, at = divmod(first, cols)
    return read_columns(tensor, matrix * rows, rows, at, count)


def read_columns(
    tensor: Tensor, first_row: int, rows: int, first: int, count: int
) -> np.ndarray:  # fmt: skip
    """Columns [first, first + count) of some rows of a tensor of floats, as rows of raw bits
    [count, rows]."""
    bits = quantize.BITS[tensor.dtype]
    out = np.empty((count, rows), bits)
    start = tensor.offset + (first_row * tensor.shape[-1] + first) * bits.itemsize
    for row in range(rows):
        at = start + row * tensor.shape[-1] * bits.itemsize
        out[:, row] = np.frombuffer(tensor.file.read(at, count * bits.itemsize), bits)
    return out


def prefix_of(names: Iterable[str], embed: str = EMBED, prefixes: tuple = PREFIXES) -> str:
    """What stands before all names: the first prefix under which there is an embedding."""
    names = set(names)
    return next((prefix for prefix in prefixes if prefix + embed in names), prefixes[0])


def is_weight(name: str) -> bool:
    """Whether a tensor that nobody asked for may not be ignored."""
    return not _NOT_WEIGHTS.fullmatch(name)


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment may be, in order of preference; a checkpoint has one of them."""
    shape = (part.cols,) if part.lanes == 1 else (part.rows, part.cols)
    if layer == spec.n_layers:
        return [Source(f"{prefix}norm.weight", shape)]
    base = f"{prefix}layers.{layer}."
    if kind == Kind.EXPERT:
        return _expert_sources(spec, base, index, part)
    if part.name == "router":
        return [Source(f"{base}{block}.gate.weight", shape) for block in _MOE_BLOCKS]
    if part.name in _DENSE:
        return [Source(base + _DENSE[part.name], shape)]
    block = {Kind.DENSE: "self_attn", Kind.FFN: "mlp", Kind.SHARED: "mlp.shared_expert"}[kind]
    stem, _, bias = part.name.partition("_")
    return [Source(f"{base}{block}.{stem}_proj.{bias or 'weight'}", shape)]


def _expert_sources(spec: ModelSpec, base: str, expert: int, part: Part) -> list[Source]:
    """One tensor an expert, or one for all of them: gate above up as transformers 5 has it, or
    apart as GGUF has it."""
    shape, experts, rows = (part.rows, part.cols), spec.n_experts, part.rows
    if part.name == "down":
        fused, fused_shape, first = "down_proj", (experts, *shape), expert * rows
    else:
        fused, fused_shape = "gate_up_proj", (experts, 2 * rows, part.cols)
        first = (2 * expert + (part.name == "up")) * rows
    found = []
    for block in _MOE_BLOCKS:
        own = f"{base}{block}.experts.{expert}."
        found.append(Source(f"{own}{part.name}_proj.weight", shape))
        found.append(Source(f"{own}{_MIXTRAL[part.name]}.weight", shape))
        found.append(Source(f"{base}{block}.experts.{fused}", fused_shape, first))
        if part.name != "down":
            apart = f"{base}{block}.experts.{part.name}_proj"
            found.append(Source(apart, (experts, *shape), expert * rows))
    return found
