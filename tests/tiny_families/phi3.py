"""Phi-3: fused matrices, longrope, a part of a head rotated, windows."""

from dataclasses import replace

import numpy as np

from edgemem.spec import RopeSpec

from .drawing import LLAMA_NAMES, config as llama_config
from .drawing import gated, gguf_layers, longrope, stem_and_kind, tables

ARCHITECTURE = "Phi3ForCausalLM"
GGUF = "phi3"
_ABSENT = {
    "hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": None,
    "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0,
}  # fmt: skip


def spec(draw, vocab_size: int):
    plain = gated(draw, "phi3", vocab_size)
    window = draw.one((0, 3, 16))
    plain = replace(plain, windows=(window,) * plain.n_layers)
    dims = draw.one([0, *range(2, plain.head_dim, 2)])
    if draw.maybe(0.6):
        return replace(plain, rope=longrope(draw, plain, dims))
    return replace(plain, rope=RopeSpec(theta=draw.one((100.0, 10000.0)), dims=dims))


def biases(draw) -> dict:
    return {"qkv": False, "o": False, "mlp": False}


def config(draw, spec, biases: dict):
    rope, share = spec.rope, (spec.rope.dims or spec.head_dim) / spec.head_dim
    inner, more = {}, {"sliding_window": spec.windows[0] or None}
    if rope.type == "longrope":
        inner = {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        if draw.maybe(0.5):
            inner["attention_factor"] = round(rope.attention_factor, 3)
            rope = replace(rope, attention_factor=inner["attention_factor"])
        more["original_max_position_embeddings"] = rope.original_positions
    if draw.maybe(0.5):  # as transformers 4 has it
        kind = {draw.one(("type", "rope_type")): draw.one(("longrope", "su"))}
        more |= {"rope_theta": rope.theta, "partial_rotary_factor": share}
        if "su" in kind.values():  # which transformers takes from here alone
            inner |= {"original_max_position_embeddings": rope.original_positions}
        more["rope_scaling"] = kind | inner if rope.type == "longrope" else None
    else:
        inner |= {"rope_type": rope.type, "rope_theta": rope.theta}
        more["rope_parameters"] = inner | {"partial_rotary_factor": share}
    return llama_config(draw, spec, ARCHITECTURE, _ABSENT, more), rope


def tensors(draw, spec, weights) -> dict:
    found = tables(draw, spec, weights)
    for (_, layer, _), bundle in weights.bundles.items():
        base = f"model.layers.{layer}."
        for name, value in fused(bundle).items():
            stem, parameter = stem_and_kind(name)
            known = LLAMA_NAMES | {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
            key = "model.norm" if stem == "norm" else base + known[stem]
            found[f"{key}.{parameter}"] = value
    return found


def fused(bundle: dict) -> dict:
    """The bundle with q, k and v as one matrix, and gate and up as one."""
    found = dict(bundle)
    for parts in (("q", "k", "v"), ("gate", "up")):
        if parts[0] in bundle:
            found["_".join(parts) if len(parts) == 2 else "qkv"] = np.concatenate(
                [found.pop(name) for name in parts]
            )
    return found


def gguf_facts(seed: int) -> dict:
    return {"activation": "silu"}


def gguf_keys(writer, spec) -> None:
    writer.add_sliding_window(spec.windows[0])
    writer.add_rope_scaling_orig_ctx_len(spec.rope.original_positions or spec.max_positions)
    if spec.rope.type == "longrope":
        writer.add_rope_scaling_attn_factors(spec.rope.attention_factor)


def gguf_tensors(spec, weights) -> dict:
    class Fused:
        bundles = {key: fused(bundle) for key, bundle in weights.bundles.items()}
        table, head = weights.table, weights.head

    names = {"qkv": "attn_qkv", "gate_up": "ffn_up"}
    known = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "o": "attn_output"} | names
    found = gguf_layers(spec, Fused, known | {"down": "ffn_down"})
    if spec.rope.type == "longrope":
        found["rope_factors_short.weight"] = np.array(spec.rope.short_factors, np.float32)
        found["rope_factors_long.weight"] = np.array(spec.rope.long_factors, np.float32)
    return found
