"""GLM-4.5: experts chosen in groups by biased sigmoids, behind some dense layers."""

from dataclasses import replace

import gguf
import numpy as np
from tiny_config import spell_rope

from edgemem.spec import RopeSpec

from .drawing import GGUF_NAMES, LLAMA_NAMES, config as llama_config
from .drawing import fused_experts, gated, gguf_layers, stem_and_kind, tables, with_rope

ARCHITECTURE = "Glm4MoeForCausalLM"
GGUF = "glm4moe"
_ABSENT = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "use_qk_norm": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def spec(draw, vocab_size: int):
    plain, width = gated(draw, "glm4_moe", vocab_size), draw.whole(8, 24)
    if draw.maybe(0.4):
        plain = replace(plain, hidden=draw.whole(24, 60))
    n_layers, dense = plain.n_layers, draw.whole(0, min(2, plain.n_layers - 1))
    n_experts, groups, top = draw.one(
        ((4, 0, 0), (5, 0, 0), (8, 2, 1), (8, 4, 2), (9, 3, 2), (12, 3, 3))
    )
    most = n_experts // max(groups, 1) * max(top, 1)
    plain = replace(
        plain, routed=tuple(i >= dense for i in range(n_layers)), n_experts=n_experts,
        top_k=draw.whole(1, min(most, 4)), n_groups=groups, top_groups=top, router_bias=True,
        scoring="sigmoid", normalize_top_k=draw.maybe(0.6), expert_intermediate=width,
        routed_scale=draw.one((1.0, draw.real(0.5, 2.5))), shared_gated=False,
        shared_intermediate=width * draw.one((1, 1, 2)), qk_norm=draw.one(("none", "head")),
    )  # fmt: skip
    plain = with_rope(draw, plain)
    dims = draw.one((0, plain.head_dim // 2)) if plain.head_dim % 4 == 0 else 0
    if dims == 2 and plain.rope.type == "dynamic":
        dims = 0
    return replace(plain, rope=replace(plain.rope, dims=dims))


def biases(draw) -> dict:
    return {"qkv": draw.maybe(0.5), "o": False, "mlp": False}


def config(draw, spec, biases: dict):
    rope, spelled = spell_rope(draw, spec)
    share = (spec.rope.dims or spec.head_dim) / spec.head_dim
    inner = rope.get("rope_parameters")
    if inner is not None and draw.maybe(0.5):
        inner["partial_rotary_factor"] = share
    elif share != 0.5 or draw.maybe(0.5):
        rope["partial_rotary_factor"] = share
    more = rope | {
        "attention_bias": biases["qkv"], "use_qk_norm": spec.qk_norm == "head",
        "head_dim": spec.head_dim, "moe_intermediate_size": spec.expert_intermediate,
        "num_experts_per_tok": spec.top_k, "n_routed_experts": spec.n_experts,
        "n_shared_experts": spec.shared_intermediate // spec.expert_intermediate,
        "routed_scaling_factor": spec.routed_scale, "n_group": spec.n_groups or 1,
        "topk_group": spec.top_groups or 1, "norm_topk_prob": spec.normalize_top_k,
        "first_k_dense_replace": spec.routed.index(True), "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return llama_config(draw, spec, ARCHITECTURE, _ABSENT, more), spelled


_BESIDE = ("attn_norm", "o", "ffn_norm", "router")
"""What layers have beside heads."""


def tensors(draw, spec, weights, attention=None) -> dict:
    """`attention(spec, bundle)` has what is in place of heads of the usual kind, if anything is."""
    found, fused = tables(draw, spec, weights), draw.maybe(0.3)
    for (kind, layer, index), bundle in weights.bundles.items():
        base = f"model.layers.{layer}."
        inner = {"shared": "shared_experts.", "expert": f"experts.{index}."}.get(kind, "")
        if attention and kind == "dense" and layer < spec.n_layers:
            found |= {f"{base}{name}": v for name, v in attention(spec, bundle).items()}
            bundle = {name: v for name, v in bundle.items() if stem_and_kind(name)[0] in _BESIDE}
        for name, value in bundle.items():
            stem, parameter = stem_and_kind(name)
            if layer == spec.n_layers:
                found["model.norm.weight"] = value
            elif stem == "router":
                last = "weight" if parameter == "weight" else "e_score_correction_bias"
                found[f"{base}mlp.gate.{last}"] = value
            elif kind in ("shared", "expert") and not (fused and kind == "expert"):
                found[f"{base}mlp.{inner}{stem}_proj.weight"] = value
            elif kind != "expert":
                found[f"{base}{LLAMA_NAMES[stem]}.{parameter}"] = value
    for layer in range(spec.n_layers if fused else 0):
        if spec.routed[layer]:
            gate_up, down = fused_experts(weights, layer, spec.n_experts)
            found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
            found[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    foretells = draw.maybe(0.3) and spec.model_type != "deepseek_v2"
    if foretells:  # tokens after the next, in a layer of its own
        found[f"model.layers.{spec.n_layers}.eh_proj.weight"] = np.ones((2, 2))
    return found


def gguf_facts(seed: int) -> dict:
    facts = {"activation": "silu", "n_layers": 2, "routed": (False, True), "windows": (0, 0)}
    return facts | {
        "routed_scale": 2.5,
        "max_positions": 512,
        "rope": RopeSpec(dims=2 * (seed % 2)),
    }


def gguf_keys(writer, spec) -> None:
    writer.add_expert_shared_count(spec.shared_intermediate // spec.expert_intermediate)
    writer.add_leading_dense_block_count(spec.routed.index(True))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(spec.routed_scale)
    if spec.n_groups:
        writer.add_expert_group_count(spec.n_groups)
        writer.add_expert_group_used_count(spec.top_groups)


def gguf_tensors(spec, weights) -> dict:
    names = GGUF_NAMES | {"ffn_norm": "post_attention_norm"}
    found = gguf_layers(spec, weights, names)
    return {name.replace("ffn_gate_inp.bias", "exp_probs_b.bias"): v for name, v in found.items()}
