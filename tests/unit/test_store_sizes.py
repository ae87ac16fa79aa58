"""How large stores of real models are, beside GGUF files of the same tensors and types."""

from collections import Counter

import gguf
import pytest
from bench.shapes import config_of
from bench.weights import Weights

from edgemem.converters.configuration import describe
from edgemem.dtypes import BY_NAME, F32, Q8_0
from edgemem.format import Layout

PAGE, GGUF_ALIGNMENT, MOST = 4096, 32, 1.005
SHAPES = (
    "qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b", "gpt-oss-20b", "llama-3.2-1b", "llama-3.1-8b",
    "gemma-2-2b", "phi-3.5-moe", "glm-4.5-air", "deepseek-v2-lite",
)  # fmt: skip
BLOCKS = [dtype for dtype in BY_NAME.values() if dtype.is_block]


def in_type(segment, dtype):
    """What a matrix becomes: q8_0 where its rows are not whole blocks, f32 for routers."""
    if segment.name == "router":
        return F32
    if segment.rows == 1 or segment.cols % Q8_0.block:
        return segment.dtype
    return Q8_0 if segment.cols % dtype.block else dtype


def tensor_bytes(segment, dtype) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype.name.upper()]]
    return -(-segment.rows * segment.cols // block * size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def bundle_bytes(layout: Layout, dtype) -> tuple[int, int]:
    """Of a bundle, whole pages, and of its tensors in a GGUF file."""
    types = [in_type(segment, dtype) for segment in layout.segments]
    parts = [(s.name, d, s.lanes, s.rows, s.cols) for s, d in zip(layout.segments, types)]
    end = max(segment.offset + segment.bytes for segment in Layout.build(parts).segments)
    return -(-end // PAGE) * PAGE, sum(map(tensor_bytes, layout.segments, types))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_store_is_hardly_larger_than_its_gguf(shape):
    """What fills up pages and planes of scales is half a per cent of a whole model at most."""
    weights = Weights(describe(config_of(shape), {}), 0, "bf16")
    layouts = Counter(layout for *_, layout in weights.bundles())
    for dtype in BLOCKS:
        ours = theirs = 0
        for layout, count in layouts.items():
            stored, tensors = bundle_bytes(layout, dtype)
            ours, theirs = ours + count * stored, theirs + count * tensors
        assert theirs <= ours <= MOST * theirs, f"{dtype.name}: {ours / theirs - 1:.2%} larger"
