"""The tiny checkpoints of `tiny`, written as GGUF by the `gguf` package as llama.cpp's converter
writes them: rows of q and k interleaved for the llama architecture, experts stacked, rope factors.
"""

import math
from pathlib import Path

import gguf
import gguf_rows
import numpy as np
import tiny
from gguf import GGMLQuantizationType as Type
from tiny_families import FAMILIES

from edgemem.spec import ModelSpec, RopeSpec

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe",
                 "qwen3_moe": "qwen3moe"}  # fmt: skip
_DENSE = {
    "attn_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight",
    "router": "ffn_gate_inp.weight", "shared_gate": "ffn_gate_inp_shexp.weight",
    "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight",
    "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight", "o": "attn_output.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
}  # fmt: skip


BLOCKS = (
    Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
    Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4,
)  # fmt: skip
"""Formats that are taken over and never made."""


def q4_k_m(name: str) -> Type:
    """Types as llama.cpp mixes them for Q4_K_M: half of the values and downs get more bits."""
    more = "blk.0" in name and ("attn_v" in name or "ffn_down" in name)
    return Type.Q6_K if more or name == "output.weight" else Type.Q4_K


def of_every_type(name: str) -> Type:
    """Neighbours differ: q, k and v, gate and up, and the layers."""
    parts = ("embd", "output.w", "attn_q", "attn_k", "attn_v", "attn_o", "gate", "up", "down")
    which = next(i for i, part in enumerate(parts) if part in name or i == len(parts) - 1)
    return (*BLOCKS, Type.Q8_0, Type.Q4_0)[(which + 5 * ("blk.1" in name)) % 13]


def facts(model_type: str, seed: int, blocks: int = 0) -> dict:
    """Facts for `tiny.write` that keep a spec to what GGUF says and llama.cpp computes.

    With `blocks`, 32 or 256, every row is a whole number of blocks of so many.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type].gguf_facts(seed)
    routed = {"mixtral": (True, True), "olmoe": (True, True)}.get(model_type, (False, False))
    if model_type in ("qwen2_moe", "qwen3_moe"):
        routed = ((True, True), (False, True), (True, False))[seed % 3]
    window = 5 * (model_type == "mistral" and seed % 2)
    found = {
        "activation": "silu", "n_layers": 2, "routed": routed, "windows": (window, window),
        "max_positions": 512, "rope": ROPES[seed % len(ROPES)], "clip_qkv": 0.0,
    }  # fmt: skip
    if blocks:
        width = {32: 96, 256: 512}[blocks]
        found |= {"hidden": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
        found |= {"intermediate": width}
    if blocks == 256:
        found |= {"hidden": 256, "head_dim": 64}
    if blocks and any(routed):
        found |= {"expert_intermediate": width, "shared_intermediate": 0}
    if blocks and model_type == "qwen2_moe":
        found["shared_intermediate"] = blocks
    return found


ROPES = (
    RopeSpec(theta=500000.0),
    RopeSpec("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    RopeSpec("linear", 10000.0, 4.0),
    RopeSpec("yarn", 1000000.0, 4.0, 128),
)


def architecture(model_type: str) -> str:
    """What llama.cpp calls a model type."""
    if model_type in FAMILIES:
        return FAMILIES[model_type].GGUF
    return ARCHITECTURES.get(model_type, model_type)


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of LlamaModel in convert_hf_to_gguf.py."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def name_of(kind: str, layer: int, part: str) -> str:
    """The GGUF name of a segment of a bundle; all experts of a layer share one."""
    if part == "norm":
        return "output_norm.weight"
    if kind == "dense":
        return f"blk.{layer}.{_DENSE[part]}"
    stem, _, bias = part.partition("_")
    tail = {"ffn": "", "shared": "_shexp", "expert": "_exps"}[kind]
    return f"blk.{layer}.ffn_{stem}{tail}.{bias or 'weight'}"


def heads_of(spec: ModelSpec, name: str) -> int:
    """In how many heads llama.cpp's converter interleaves the rows of a tensor; 0 for most."""
    if architecture(spec.model_type) not in ("llama", "granite", "granitemoe"):
        return 0
    return {"attn_q": spec.n_heads, "attn_k": spec.n_kv_heads}.get(name.split(".")[-2], 0)


def tensors(spec: ModelSpec, weights: "tiny.TinyWeights") -> dict[str, np.ndarray]:
    """The model's weights by GGUF names, as float32."""
    if spec.model_type in FAMILIES:
        found = FAMILIES[spec.model_type].gguf_tensors(spec, weights)
        for name, values in found.items():
            heads = heads_of(spec, name) if name.startswith("blk.") else 0
            found[name] = interleaved(values, heads) if heads else values
        if spec.rope.type == "llama3":
            found["rope_freqs.weight"] = rope_factors(spec)
        return found
    found = {"token_embd.weight": weights.table()}
    if not spec.tied:
        found["output.weight"] = weights.head()
    for (kind, layer, index), bundle in weights.bundles.items():
        for part, values in bundle.items():
            name = name_of(kind, layer, part)
            if kind == "expert":
                found.setdefault(name, []).append(values)
                continue
            heads = heads_of(spec, name)
            found[name] = interleaved(values, heads) if heads else values
    if spec.rope.type == "llama3":
        found["rope_freqs.weight"] = rope_factors(spec)
    found = {name: np.stack(v) if isinstance(v, list) else v for name, v in found.items()}
    return {n: v[0] if "inp_shexp" in n else v for n, v in found.items()}


def rope_factors(spec: ModelSpec) -> np.ndarray:
    """`generate_extra_tensors` of LlamaModel in convert_hf_to_gguf.py, in 32-bit floats."""
    rope, f32, factors = spec.rope, np.float32, []
    for k in range(0, spec.head_dim, 2):
        frequency = f32(1) / f32(rope.theta) ** (f32(k) / f32(spec.head_dim))
        wave = f32(2 * math.pi) / frequency
        if wave < rope.original_positions / rope.high_freq_factor:
            factors.append(1.0)
        elif wave > rope.original_positions / rope.low_freq_factor:
            factors.append(rope.factor)
        else:
            span = f32(rope.high_freq_factor - rope.low_freq_factor)
            smooth = (f32(rope.original_positions) / wave - f32(rope.low_freq_factor)) / span
            factors.append(f32(1) / ((1 - smooth) / f32(rope.factor) + smooth))
    return np.array(factors, np.float32)


def write(path: Path, model: "tiny.Tiny", kind=Type.F32, split: int = 0, more=None) -> Path:
    """Write a GGUF of the model's matrices in one type (or in `kind(name)`); return its path.

    Vectors, routers and rows that are no whole number of blocks are F32, as llama.cpp has them.
    `split` is the most tensors a file may hold; the path of the first part is returned.
    `more(writer)` adds keys.
    """
    spec = model.spec
    arch = architecture(spec.model_type)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    write_metadata(writer, spec)
    if spec.model_type in FAMILIES:
        FAMILIES[spec.model_type].gguf_keys(writer, spec)
    write_vocabulary(writer, spec)
    if more:
        more(writer)
    for name, values in tensors(spec, model.weights).items():
        chosen = kind(name) if callable(kind) else kind
        whole = values.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0
        vector = values.ndim == 1 or name.endswith(".bias")
        if vector or "ffn_gate_inp" in name or not whole:
            chosen = Type.F32
        data = gguf_rows.quantized(np.ascontiguousarray(values, np.float32), chosen)
        writer.add_tensor(name, data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-*-of-*.gguf")) if split else path


def write_metadata(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """The keys that say what shape a model of tiny's own types has."""
    writer.add_block_count(spec.n_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_key_length(spec.key_dim)
    writer.add_value_length(spec.latent or spec.head_dim)
    writer.add_rope_dimension_count(spec.rope.dims or spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    if spec.rope.type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(spec.rope.type))
        writer.add_rope_scaling_factor(spec.rope.factor)
    if spec.rope.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(spec.rope.original_positions)
        plain = 1 + 0.1 * math.log(spec.rope.factor)
        if not spec.latent:
            writer.add_rope_scaling_attn_factors(spec.rope.attention_factor / plain)
        writer.add_rope_scaling_yarn_beta_fast(spec.rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(spec.rope.beta_slow)
    if spec.clip_qkv:
        writer.add_clamp_kqv(spec.clip_qkv)
    if any(spec.windows):
        writer.add_sliding_window(max(spec.windows))
    if any(spec.routed):
        writer.add_expert_count(spec.n_experts)
        writer.add_expert_used_count(spec.top_k)
        writer.add_expert_feed_forward_length(spec.expert_intermediate)
        writer.add_expert_weights_norm(spec.normalize_top_k)
    if spec.shared_intermediate:
        writer.add_expert_shared_feed_forward_length(spec.shared_intermediate)


def write_vocabulary(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """The tokenizer of `tiny` (two control tokens, the 256 bytes), one merge since llama.cpp wants
    some, padding up to the vocabulary."""
    texts = ["<s>", "</s>", *tiny.byte_letters(), "th"]
    types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 257
    for id in range(len(texts), spec.vocab_size):
        texts.append(f"[PAD{id}]")
        types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(["t h"])
    if spec.bos_id is not None:
        writer.add_bos_token_id(spec.bos_id)
    if spec.eos_ids:
        writer.add_eos_token_id(spec.eos_ids[0])
    writer.add_add_bos_token(False)
