"""GGUF files, written front to back (version 3: github.com/ggml-org/ggml, docs/gguf.md), and the
names and fields by which llama.cpp knows the models that edgemem supports."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from bench.synth_tokenizer import tokens
from edgemem.dtypes import BF16, F16, F32, Q4_0, Q8_0, DType, round_up
from edgemem.format import Kind
from edgemem.models.rope import inverse_frequencies
from edgemem.spec import ModelSpec

ALIGNMENT = 32
_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q8_0: 8, BF16: 30}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9

_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "olmoe": "olmoe", "qwen2": "qwen2",
    "qwen3": "qwen3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
_DENSE = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "ffn_norm": "ffn_norm",
    "router": "ffn_gate_inp", "shared_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
_FFN = {Kind.FFN: "ffn_{}", Kind.EXPERT: "ffn_{}_exps", Kind.SHARED: "ffn_{}_shexp"}


def tensor_name(spec: ModelSpec, kind: Kind, layer: int, segment: str) -> str:
    """What llama.cpp calls the tensor that a segment belongs to."""
    if kind == Kind.EMBED or (kind == Kind.HEAD and spec.tied):
        return "token_embd.weight"
    if kind == Kind.HEAD:
        return "output.weight"
    if layer == spec.n_layers:
        return "output_norm.weight"
    stem, bias = segment.removesuffix("_bias"), segment.endswith("_bias")
    name = _DENSE[stem] if kind == Kind.DENSE else _FFN[kind].format(stem)
    return f"blk.{layer}.{name}.{'bias' if bias else 'weight'}"


def fields(spec: ModelSpec) -> list[tuple[str, int, object]]:
    """(key, type, value) of everything that llama.cpp needs to know of a model."""
    arch = _ARCHITECTURES[spec.model_type]
    found = [
        ("general.architecture", _STRING, arch),
        ("general.name", _STRING, f"synthetic {spec.model_type}"),
        ("general.alignment", _U32, ALIGNMENT),
    ]
    numbers = {
        "block_count": spec.n_layers, "context_length": spec.max_positions,
        "embedding_length": spec.hidden, "vocab_size": spec.vocab_size,
        "feed_forward_length": spec.intermediate or spec.expert_intermediate,
        "attention.head_count": spec.n_heads, "attention.head_count_kv": spec.n_kv_heads,
        "attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim,
        "rope.dimension_count": spec.head_dim, "expert_count": spec.n_experts,
        "expert_used_count": spec.top_k,
    }  # fmt: skip
    if arch in ("qwen2moe", "qwen3moe"):
        numbers["expert_feed_forward_length"] = spec.expert_intermediate
        numbers["expert_shared_feed_forward_length"] = spec.shared_intermediate
    found += [(f"{arch}.{key}", _U32, value) for key, value in numbers.items() if value]
    found.append((f"{arch}.attention.layer_norm_rms_epsilon", _F32, spec.norm_eps))
    found.append((f"{arch}.rope.freq_base", _F32, spec.rope.theta))
    return found + _vocabulary(spec.vocab_size)


def _vocabulary(size: int) -> list[tuple[str, int, object]]:
    """The tokenizer of `synth_tokenizer`; types are 3 control, 6 byte, 5 unused."""
    named = tokens()[:size]
    padded = named + [f"<unused{i}>" for i in range(size - len(named))]
    types = [3, 3] + [6] * (len(named) - 2) + [5] * (size - len(named))
    key = "tokenizer.ggml"
    return [
        (f"{key}.model", _STRING, "llama"),
        (f"{key}.tokens", _ARRAY, (_STRING, padded)),
        (f"{key}.scores", _ARRAY, (_F32, [0.0] * size)),
        (f"{key}.token_type", _ARRAY, (_I32, types)),
        (f"{key}.bos_token_id", _U32, 0),
        (f"{key}.eos_token_id", _U32, 1),
        (f"{key}.unknown_token_id", _U32, 0),
        (f"{key}.add_bos_token", _BOOL, False),
        (f"{key}.add_space_prefix", _BOOL, False),
    ]


def rope_factors(spec: ModelSpec) -> np.ndarray | None:
    """The tensor rope_freqs.weight by which llama.cpp divides frequencies, for Llama 3 scaling."""
    if spec.rope.type != "llama3":
        return None
    plain = spec.rope.theta ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim)
    scaled = inverse_frequencies(spec.rope, spec.head_dim, spec.max_positions, 1)
    return (plain / scaled).astype(np.float32)


class GgufWriter:
    """One GGUF file: `declare` all tensors, then `begin` and `write` each in that order."""

    def __init__(self, path: Path, metadata: list[tuple[str, int, object]]):
        self._metadata = metadata
        self._infos: dict[str, tuple[DType, list[int], int]] = {}
        self._size = 0
        self._file = path.open("wb")
        self._data_start = 0

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def declare(self, name: str, dtype: DType, shape: list[int]) -> None:
        """`shape` with the rows first, as in PyTorch; columns are whole blocks."""
        assert self._data_start == 0 and shape[-1] % dtype.block == 0
        self._infos[name] = dtype, shape, self._size
        count = int(np.prod(shape)) // dtype.block
        size = count * (dtype.scale_bytes + dtype.quant_bytes)
        self._size = round_up(self._size + size, ALIGNMENT)

    def begin(self, name: str) -> None:
        if self._data_start == 0:
            self._write_header()
        end = self._data_start + self._infos[name][2]
        self._file.write(bytes(end - self._file.tell()))

    def write(self, data: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(data))

    def finish(self) -> int:
        """Pad the last tensor; returns the size of the file."""
        end = self._data_start + self._size
        self._file.write(bytes(end - self._file.tell()))
        return end

    def _write_header(self) -> None:
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self._infos), len(self._metadata))]
        for key, kind, value in self._metadata:
            parts += [_string(key), struct.pack("<I", kind), _value(kind, value)]
        for name, (dtype, shape, offset) in self._infos.items():
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            parts += [_string(name), dims, struct.pack("<IQ", _TYPES[dtype], offset)]
        header = b"".join(parts)
        self._data_start = round_up(len(header), ALIGNMENT)
        self._file.write(header.ljust(self._data_start, b"\0"))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value) -> bytes:
    if kind == _STRING:
        return _string(value)
    if kind == _ARRAY:
        item, values = value
        head = struct.pack("<IQ", item, len(values))
        return head + b"".join(_value(item, v) for v in values)
    return struct.pack({_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}[kind], value)
