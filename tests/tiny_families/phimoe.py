"""Phi-3.5-MoE: LayerNorm, biases, two experts that are mixed sparsely."""

from dataclasses import replace

from edgemem.spec import RopeSpec

from .drawing import LLAMA_NAMES, config as llama_config
from .drawing import fused_experts, gated, gguf_layers, longrope, stem_and_kind, tables

ARCHITECTURE = "PhiMoEForCausalLM"
GGUF = "phimoe"
_ABSENT = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "lm_head_bias": False, "sliding_window": None, "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
}  # fmt: skip


def spec(draw, vocab_size: int):
    n_layers, width, window = draw.whole(1, 2), draw.whole(8, 30), draw.one((0, 0, 3, 16))
    plain = gated(
        draw, "phimoe", vocab_size, n_layers=n_layers, windows=(window,) * n_layers, norm="layer",
        routed=(True,) * n_layers, n_experts=draw.one((2, 4, 6)), top_k=2, scoring="sparsemixer",
        router_jitter=draw.one((0.01, 0.1, 0.3)), expert_intermediate=width, intermediate=width,
        rope=RopeSpec(theta=draw.one((100.0, 1000000.0))), max_positions=512,
    )  # fmt: skip
    if draw.maybe(0.5):
        # transformers leaves out the long factors, whatever the length: no sequence is that long
        rope = replace(longrope(draw, plain), original_positions=draw.one((40, 64)))
        short, long = draw.real(0.8, 1.4), draw.real(0.8, 1.4)
        plain = replace(plain, rope=replace(rope, attention_factor=short))
        plain = replace(plain, rope=replace(plain.rope, long_attention_factor=long))
    return plain


def biases(draw) -> dict:
    some = draw.maybe(0.5)
    return {"qkv": some, "o": some, "mlp": False, "head": draw.maybe(0.5)}


def config(draw, spec, biases: dict):
    rope, inner = spec.rope, {}
    if rope.type == "longrope":
        inner = {
            "short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors),
            "short_mscale": rope.attention_factor, "long_mscale": rope.long_attention_factor,
            "original_max_position_embeddings": rope.original_positions,
        }  # fmt: skip
    if draw.maybe(0.5):  # as transformers 4 has it
        more = {"rope_theta": rope.theta, "rope_scaling": {"type": "longrope"} | inner}
        more = more if inner else {"rope_theta": rope.theta, "rope_scaling": None}
    else:
        more = {"rope_parameters": {"rope_type": rope.type, "rope_theta": rope.theta} | inner}
    more |= {
        "attention_bias": biases["qkv"], "lm_head_bias": biases["head"],
        "num_local_experts": spec.n_experts, "num_experts_per_tok": 2,
        "router_jitter_noise": spec.router_jitter, "sliding_window": spec.windows[0] or None,
    }  # fmt: skip
    return llama_config(draw, spec, ARCHITECTURE, _ABSENT, more), rope


def tensors(draw, spec, weights) -> dict:
    found, old = tables(draw, spec, weights), draw.maybe(0.6)
    for (kind, layer, index), bundle in weights.bundles.items():
        base = f"model.layers.{layer}."
        for name, value in bundle.items():
            stem, parameter = stem_and_kind(name)
            if layer == spec.n_layers:
                key = {"head": "lm_head", "norm": "model.norm"}[stem]
                found[f"{key}.{parameter}"] = value
            elif stem == "router":
                router = "block_sparse_moe.gate" if old else "mlp.router"
                found[f"{base}{router}.weight"] = value
            elif kind != "expert":
                found[f"{base}{LLAMA_NAMES[stem]}.{parameter}"] = value
            elif old:
                matrix = {"gate": "w1", "up": "w3", "down": "w2"}[stem]
                found[f"{base}block_sparse_moe.experts.{index}.{matrix}.weight"] = value
    for layer in range(0 if old else spec.n_layers):
        gate_up, down = fused_experts(weights, layer, spec.n_experts)
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    return found


def gguf_facts(seed: int) -> dict:
    return {"activation": "silu", "rope": RopeSpec(theta=1e6), "router_jitter": 0.01}


def gguf_keys(writer, spec) -> None:
    """Those of all models are enough."""


gguf_tensors = gguf_layers
