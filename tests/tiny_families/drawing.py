"""What the families draw alike."""

import math
from dataclasses import replace

import numpy as np
from tiny_config import ACTIVATION_NAMES, draw_rope

from edgemem.spec import ModelSpec, RopeSpec

_HIDDEN = 24
"""Where there were less, one weight's rounding would show in every logit."""


def gated(draw, model_type: str, vocab_size: int, **facts) -> ModelSpec:
    """A tiny spec of Llama's kind, with some fields replaced."""
    n_layers, kv_heads = draw.whole(1, 3), draw.whole(1, 2)
    heads, head_dim = kv_heads * draw.whole(1, 3), draw.one((4, 8, 10, 16))
    while heads * head_dim < _HIDDEN:
        heads += kv_heads
    return ModelSpec(**{
        "model_type": model_type, "n_layers": n_layers, "hidden": heads * head_dim,
        "n_heads": heads, "n_kv_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab_size,
        "intermediate": draw.whole(20, 60), "activation": activation(draw),
        "norm_eps": draw.one((1e-5, 1e-6, 1e-3)), "rope": RopeSpec(),
        "windows": (0,) * n_layers, "max_positions": draw.one((64, 100, 512)),
        "tied": draw.maybe(0.4), "routed": (False,) * n_layers, "bos_id": draw.one((None, 0, 1)),
        "eos_ids": draw.one(((), (1,), (0, 1))), **facts,
    })  # fmt: skip


def ungated(draw, model_type: str, vocab_size: int, **facts) -> ModelSpec:
    """A tiny spec with LayerNorm, FFNs without a gate, and as many keys as queries."""
    head_dim = draw.one((4, 8, 10, 16))
    heads = max(draw.whole(2, 5), -(-_HIDDEN // head_dim))
    return gated(draw, model_type, vocab_size, **{
        "n_heads": heads, "n_kv_heads": heads, "head_dim": head_dim, "hidden": heads * head_dim,
        "norm": "layer", "gated": False, "activation": draw.one(tuple(ACTIVATION_NAMES)), **facts,
    })  # fmt: skip


def activation(draw) -> str:
    """Mostly silu."""
    return "silu" if draw.maybe(0.5) else draw.one(tuple(ACTIVATION_NAMES))


def with_rope(draw, spec: ModelSpec) -> ModelSpec:
    """The spec with a rope of any of the types that all models have."""
    rope, positions = draw_rope(draw, spec.model_type, spec.max_positions), spec.max_positions
    if rope.type == "dynamic":  # a sequence of `tiny.IDS_COUNT` grows past it
        positions, factor = draw.one(((8, 8.0), (12, 4.0), (17, 2.5), (24, 1.5)))
        rope = replace(rope, factor=factor)
    return replace(spec, rope=rope, max_positions=positions)


def longrope(draw, spec: ModelSpec, dims: int = 0) -> RopeSpec:
    """Longrope, mostly with a switch of factors within `tiny.IDS_COUNT` tokens."""
    half, original = (dims or spec.head_dim) // 2, draw.one((9, 16, 20, 40))
    short, long = (
        tuple(float(np.float32(draw.real(low, high))) for _ in range(half))
        for low, high in ((1.0, 1.5), (1.0, 8.0))
    )
    factor = spec.max_positions / original
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeSpec(
        "longrope", draw.one((100.0, 10000.0)), original_positions=original, dims=dims,
        attention_factor=attention, short_factors=short, long_factors=long,
    )  # fmt: skip


def config(draw, spec: ModelSpec, architecture: str, absent: dict, more: dict) -> dict:
    """The keys that Llama's config has, and `more`; what is `absent` with its value may be."""
    found = {
        "architectures": [architecture],
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "hidden_act": draw.one(ACTIVATION_NAMES[spec.activation]),
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
    } | more
    return without(draw, found, absent)


def without(draw, config: dict, absent: dict) -> dict:
    """The config without some of the keys whose value is the default."""
    gone = {k for k, value in absent.items() if config.get(k) == value and draw.maybe(0.4)}
    return {key: value for key, value in config.items() if key not in gone}


LLAMA_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    **{x: f"self_attn.{x}_proj" for x in "qkvo"},
    **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}  # fmt: skip


def tables(draw, spec: ModelSpec, weights) -> dict[str, np.ndarray]:
    """Embedding and output table; some checkpoints keep a copy of what is tied."""
    tensors = {"model.embed_tokens.weight": weights.table()}
    if not spec.tied or draw.maybe(0.2):
        tensors["lm_head.weight"] = weights.head()
    return tensors


def stem_and_kind(name: str) -> tuple[str, str]:
    """A segment's name without "_bias", and what its parameter is called."""
    stem = name.removesuffix("_bias")
    return stem, "weight" if stem == name else "bias"


def fused_experts(weights, layer: int, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """All experts of a layer: gate above up, and down."""
    experts = [weights.expert(layer, i) for i in range(n_experts)]
    gate_up = np.stack([np.concatenate([e["gate"], e["up"]]) for e in experts])
    return gate_up, np.stack([e["down"] for e in experts])


# ---- GGUF --------------------------------------------------------------------------------------

GGUF_NAMES = {
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "router": "ffn_gate_inp",
}  # fmt: skip


def gguf_rope(seed: int) -> RopeSpec:
    """One of the ropes that GGUF and llama.cpp have for most models."""
    linear, yarn = RopeSpec("linear", 10000.0, 4.0), RopeSpec("yarn", 1000000.0, 4.0, 128)
    llama3 = RopeSpec("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    return (RopeSpec(theta=500000.0), llama3, linear, yarn)[seed % 4]


def gguf_tables(spec: ModelSpec, weights) -> dict[str, np.ndarray]:
    """Those that are of no layer but the final norm."""
    tied = {} if spec.tied else {"output.weight": weights.head()}
    return {"token_embd.weight": weights.table()} | tied


def gguf_layers(spec: ModelSpec, weights, names: dict = GGUF_NAMES) -> dict[str, np.ndarray]:
    """Everything but experts that lie in a tensor of their own, by GGUF's names; the experts in
    one tensor for each part."""
    found = gguf_tables(spec, weights)
    for (kind, layer, _), bundle in weights.bundles.items():
        for name, values in bundle.items():
            stem, parameter = stem_and_kind(name)
            if layer == spec.n_layers:
                known = {"norm": "output_norm", "head": "output", "positions": "position_embd"}
                found[f"{known[stem]}.{parameter}"] = values
                continue
            tail = {"expert": "_exps", "shared": "_shexp"}.get(kind, "")
            key = f"blk.{layer}.{names[stem]}{tail}.{parameter}"
            if kind == "expert":
                found.setdefault(key, []).append(values)
            else:
                found[key] = values
    return {name: np.stack(v) if isinstance(v, list) else v for name, v in found.items()}
