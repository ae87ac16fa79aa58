"""Synthetic weights as other people's checkpoints: a Hugging Face folder, and a GGUF file.

Both hold matrices row by row, so tiles drawn in a store's order are turned back into rows.
"""

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.gguf_writer import GgufWriter, fields, rope_factors, tensor_name
from bench.synth_tokenizer import tokenizer_json
from bench.weights import Tile, Weights, ahead
from edgemem.converters import naming
from edgemem.converters.configuration import describe
from edgemem.converters.families import OWN, opt
from edgemem.dtypes import BF16, BLOCK, F32, Q4_0, Q8_0, DType, scale_plane_bytes
from edgemem.format import Kind, Part, Segment

_SHARD_BYTES = 4 << 30
_HF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_STORES_ALONE = ("falcon", "gemma2", "gpt_oss", "deepseek_v2", "deepseek_v3")
"""Types whose folders have segments in turns within one tensor or in another order, or norms that
count from 1."""


@dataclass(frozen=True)
class Slice:
    """Rows of a tensor that come from one segment of one bundle."""

    kind: Kind
    layer: int
    index: int
    segment: Segment

    @property
    def is_vector(self) -> bool:
        return self.segment.lanes == 1 and self.segment.name not in ("rows", "positions")


def slices(weights: Weights) -> Iterator[Slice]:
    """Every segment of every bundle, in the order of a store."""
    for kind, layer, index, layout in weights.bundles():
        for segment in layout.segments:
            yield Slice(kind, layer, index, segment)


def _check_names(weights: Weights, form: str, unknown: Container[str]) -> None:
    model_type = weights.spec.model_type
    if model_type in unknown:
        raise ValueError(f"{form} of type {model_type} cannot be made here; write a store instead")


def to_rows(packed: np.ndarray, segment: Segment, rows: int) -> np.ndarray:
    """A tile as GGML and PyTorch have it: uint8 [rows, bytes of a row], blocks after each other."""
    lanes, cols, dtype = segment.lanes, segment.cols, segment.dtype
    groups = len(packed)
    if not dtype.is_block:
        flat = packed[:, : cols * lanes * dtype.quant_bytes].view(f"V{dtype.quant_bytes}")
        turned = flat.reshape(groups, cols, lanes).transpose(0, 2, 1)
        return np.ascontiguousarray(turned).reshape(groups * lanes, cols).view(np.uint8)[:rows]
    plane, blocks = scale_plane_bytes(dtype, cols, lanes), cols // BLOCK
    out = np.empty((groups, lanes, blocks), [("d", "<u2"), ("q", f"V{dtype.quant_bytes}")])
    scales = packed[:, : blocks * lanes * 2].copy().view("<u2").reshape(groups, blocks, lanes)
    out["d"] = scales.transpose(0, 2, 1)
    chunks = packed[:, plane:].reshape(groups, -1, lanes * 4).view(np.uint32)
    turned = np.ascontiguousarray(chunks.transpose(0, 2, 1))
    if dtype == Q8_0:
        turned ^= np.uint32(0x80808080)
    else:
        assert dtype == Q4_0
    out["q"] = turned.view(f"V{dtype.quant_bytes}").reshape(groups, lanes, blocks)
    return out.reshape(groups * lanes, blocks).view(np.uint8)[:rows]


# --- Hugging Face folder --------------------------------------------------------------------------


def write_folder(config: dict, folder: Path, dtype: str, seed: int = 0) -> int:
    """Write config, tokenizer and safetensors shards into `folder`; returns the bytes of tensors.

    Raises ValueError for a dtype that such folders do not have.
    """
    if dtype not in _HF_TYPES:
        raise ValueError(f"a folder holds bf16 or f16, not {dtype}; write a store or a GGUF file")
    weights = Weights(describe(config, {}), seed, dtype)
    _check_names(weights, "a folder", _STORES_ALONE)
    folder.mkdir(parents=True, exist_ok=True)
    config = config | {"torch_dtype": {"bf16": "bfloat16", "f16": "float16"}[dtype]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    shards = _shards(weights)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, weights, shard)
    weight_map = {t: n for n, shard in zip(names, shards, strict=True) for t in shard}
    total = sum(_bytes(part) for shard in shards for parts in shard.values() for part in parts)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(weights: Weights) -> list[dict[str, list[Slice]]]:
    """Tensors by name and the slices they are made of, cut into files."""
    shards, size = [{}], 0
    for part in slices(weights):
        name = _hf_name(weights, part)
        if size > _SHARD_BYTES and name not in shards[-1]:
            shards.append({})
            size = 0
        shards[-1].setdefault(name, []).append(part)
        size += _bytes(part)
    return shards


def _hf_name(weights: Weights, part: Slice) -> str:
    spec, segment = weights.spec, part.segment
    own = OWN.get(spec.model_type, naming)
    prefix = own.PREFIXES[0]
    if part.kind == Kind.EMBED or (part.kind == Kind.HEAD and spec.tied):
        return prefix + own.EMBED
    if part.kind == Kind.HEAD:
        return own.HEAD[0]
    wanted = Part(segment.name, segment.rows, segment.cols, segment.lanes)
    found = own.sources(spec, prefix, part.kind, part.layer, part.index, wanted)
    names = [source.tensor for source in found]
    if spec.model_type == "mixtral" and len(names) > 1:  # as its own files have it
        saved = [name for name in names if "block_sparse_moe" in name]
        return next((name for name in saved if ".w" in name), saved[0])
    return names[0]


def _write_shard(path: Path, weights: Weights, shard: dict[str, list[Slice]]) -> None:
    header, end = {}, 0
    for name, parts in shard.items():
        first = parts[0]
        rows = _rows_before(first.segment) + sum(part.segment.rows for part in parts)
        shape = [first.segment.cols] if first.is_vector else [rows, first.segment.cols]
        start, end = end, end + sum(map(_bytes, parts))
        dtype = weights.dtype if first.segment.dtype == F32 else first.segment.dtype.name
        header[name] = {
            "dtype": _HF_TYPES[dtype], "shape": shape, "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [part for parts in shard.values() for part in parts]
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for rows in _drawn(weights, parts):
            file.write(rows)


def _bytes(part: Slice) -> int:
    """In a folder: vectors take two bytes as well."""
    return (_rows_before(part.segment) + part.segment.rows) * part.segment.cols * 2


def _rows_before(segment: Segment) -> int:
    """Rows of a folder's tensor, of zeros, before the first that a store holds."""
    return opt.FIRST_POSITION if segment.name == "positions" else 0


def _drawn(weights: Weights, parts: list[Slice]) -> Iterator[np.ndarray]:
    """All rows of the parts in a folder's formats."""

    def rows(tile: Tile) -> np.ndarray:
        packed, segment = weights.draw(tile), tile.segment
        if segment.lanes == 1 and segment.dtype == F32:
            values = packed.view(np.uint32)
            if tile.first_row == 0:
                values = np.pad(values, ((_rows_before(segment), 0), (0, 0)))
            if weights.dtype == "bf16":
                return (values >> 16).astype(np.uint16)
            return values.view(np.float32).astype(np.float16)
        return to_rows(packed, segment, tile.rows)

    tiles = (t for p in parts for t in weights.tiles(p.kind, p.layer, p.index, p.segment))
    return ahead(tiles, rows)


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(config: dict, target: Path, dtype: str, seed: int = 0, force: bool = False) -> int:
    """Write a GGUF file that llama.cpp runs; returns its size in bytes."""
    if target.exists() and not force:
        raise FileExistsError(f"writing {target}: it exists; remove it first, or --force")
    weights = Weights(describe(config, {}), seed, dtype)
    _check_names(weights, "a GGUF file", OWN)
    spec, tensors = weights.spec, {}
    for part in slices(weights):
        name = tensor_name(spec, part.kind, part.layer, part.segment.name)
        tensors.setdefault(name, []).append(part)
    factors = rope_factors(spec)
    with GgufWriter(target, fields(spec)) as writer:
        for name, parts in tensors.items():
            writer.declare(name, _gguf_dtype(parts[0].segment), _gguf_shape(parts))
        if factors is not None:
            writer.declare("rope_freqs.weight", F32, [len(factors)])
        for name, parts in tensors.items():
            writer.begin(name)
            for rows in _gguf_rows(weights, parts):
                writer.write(rows)
        if factors is not None:
            writer.begin("rope_freqs.weight")
            writer.write(factors)
        return writer.finish()


def _gguf_shape(parts: list[Slice]) -> list[int]:
    """All experts of a layer are one tensor, and so are all rows of a table."""
    first = parts[0].segment
    if parts[0].is_vector or first.name == "shared_gate":
        return [first.cols]
    if parts[0].kind == Kind.EXPERT:
        return [len(parts), first.rows, first.cols]
    return [sum(part.segment.rows for part in parts), first.cols]


def _gguf_dtype(segment: Segment) -> DType:
    """llama.cpp wants routers, like norms, in f32."""
    return F32 if segment.name in ("router", "shared_gate") else segment.dtype


def _gguf_rows(weights: Weights, parts: list[Slice]) -> Iterator[np.ndarray]:
    """A tensor's rows in the order of the file."""
    tiles = (t for p in parts for t in weights.tiles(p.kind, p.layer, p.index, p.segment))

    def rows(tile: Tile) -> np.ndarray:
        packed, segment = weights.draw(tile), tile.segment
        if segment.lanes == 1 and segment.name != "rows":
            return packed
        found = to_rows(packed, segment, tile.rows)
        if _gguf_dtype(segment) != segment.dtype:
            assert segment.dtype == BF16
            return found.view(np.uint16).astype(np.uint32) << 16
        return found

    drawn = ahead(tiles, rows)
    name, spec = parts[0].segment.name.removesuffix("_bias"), weights.spec
    if spec.model_type in ("llama", "mistral", "mixtral") and name in ("q", "k"):
        whole = np.concatenate(list(drawn))
        heads = spec.n_heads if name == "q" else spec.n_kv_heads
        return iter([_interleaved(whole.reshape(heads * spec.head_dim, -1), heads)])
    return drawn


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama.cpp's "llama" rotary embedding, which turns neighbours:
    its conversion (LlamaModel.permute in convert_hf_to_gguf.py) interleaves a head's two halves."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
