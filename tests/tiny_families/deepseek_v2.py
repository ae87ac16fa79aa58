"""DeepSeek-V2: heads that share a latent, experts chosen in groups by their best."""

import math
from dataclasses import replace

import gguf
import numpy as np
from tiny_config import spell_rope

from edgemem.spec import ModelSpec, RopeSpec

from . import glm4_moe
from .drawing import GGUF_NAMES, config as llama_config
from .drawing import gated, gguf_layers, stem_and_kind, with_rope

ARCHITECTURE = "DeepseekV2ForCausalLM"
GGUF = "deepseek2"
ABSENT = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
_OWN_NAMES = {
    "q_down": "self_attn.q_a_proj", "q_down_norm": "self_attn.q_a_layernorm",
    "latent_norm": "self_attn.kv_a_layernorm",
}  # fmt: skip


def spec(draw, vocab_size: int) -> ModelSpec:
    plain = latent_spec(draw, "deepseek_v2", vocab_size)
    n_experts, groups, top = draw.one(
        ((4, 0, 0), (5, 0, 0), (8, 2, 1), (8, 4, 2), (9, 3, 2), (12, 3, 3))
    )
    return replace(plain, **experts(draw, n_experts, groups, top))


def latent_spec(draw, model_type: str, vocab_size: int) -> ModelSpec:
    """A tiny spec with a latent, and no experts yet."""
    heads, rotated = draw.whole(1, 5), draw.one((2, 4, 8, 16))
    head_dim, n_layers = rotated + draw.one((2, 4, 10, 16)), draw.whole(1, 3)
    dense = draw.whole(0, min(2, n_layers - 1))
    plain = gated(
        draw, model_type, vocab_size, n_layers=n_layers, hidden=heads * draw.whole(24, 40),
        n_heads=heads, n_kv_heads=1, head_dim=head_dim, windows=(0,) * n_layers,
        routed=(False,) * n_layers,
    )  # fmt: skip
    scaled = with_rope(draw, plain)
    plain = plain if scaled.rope.type == "dynamic" and rotated == 2 else scaled
    plain = replace(
        plain, rope=replace(plain.rope, dims=rotated), latent=draw.one((16, 32, 48)),
        value_dim=draw.one((16, 32)), q_rank=draw.one((0, 0, 8, 13)), n_experts=1, top_k=1,
        expert_intermediate=8, routed=tuple(i >= dense for i in range(n_layers)),
    )  # fmt: skip
    all_dim = draw.one((0, 0.707, 1.0)) if plain.rope.type == "yarn" else 0
    return replace(plain, attention_scale=scale_of(plain.rope, head_dim, all_dim))


def scale_of(rope: RopeSpec, head_dim: int, all_dim: float) -> float:
    """What scores are multiplied by with YaRN's mscale_all_dim; 0 where there is none."""
    grown = 0.1 * all_dim * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    return grown**2 / math.sqrt(head_dim) if all_dim else 0.0


def experts(draw, n_experts: int, groups: int, top: int) -> dict:
    """Fields about experts, but for which layers have some."""
    width, most = draw.whole(8, 24), n_experts // max(groups, 1) * max(top, 1)
    return {
        "n_experts": n_experts, "n_groups": groups, "top_groups": top,
        "top_k": draw.whole(1, min(most, 4)), "expert_intermediate": width, "shared_gated": False,
        "shared_intermediate": width * draw.one((1, 1, 2)),
        "routed_scale": draw.one((1.0, draw.real(0.5, 2.5))),
    }  # fmt: skip


def biases(draw) -> dict:
    some = draw.maybe(0.3)
    return {"qkv": some, "o": some, "mlp": False}


def config(draw, spec, biases: dict):
    method = "group_limited_greedy" if spec.n_groups else "greedy"
    groups = {"n_group": spec.n_groups, "topk_group": spec.top_groups} if spec.n_groups else {}
    more = {"topk_method": method, "norm_topk_prob": False} | groups
    absent = ABSENT | {"topk_method": "greedy", "norm_topk_prob": False}
    return latent_config(draw, spec, biases, ARCHITECTURE, more, absent)


def latent_config(draw, spec, biases: dict, architecture: str, more: dict, absent: dict):
    """One config.json, and the spec's rope as spelled."""
    rope, spelled = spell_rope(draw, spec)
    if spec.rope.type == "yarn":
        spelled = _spell_scale(draw, spec, rope, spelled)
    more = more | rope | {
        "attention_bias": biases["qkv"], "kv_lora_rank": spec.latent,
        "num_key_value_heads": spec.n_heads, "q_lora_rank": spec.q_rank or None,
        "qk_nope_head_dim": spec.head_dim - spec.rope.dims, "qk_rope_head_dim": spec.rope.dims,
        "v_head_dim": spec.value_dim, "moe_intermediate_size": spec.expert_intermediate,
        "num_experts_per_tok": spec.top_k, "n_routed_experts": spec.n_experts,
        "n_shared_experts": spec.shared_intermediate // spec.expert_intermediate,
        "routed_scaling_factor": spec.routed_scale,
        "first_k_dense_replace": (*spec.routed, True).index(True),
    }  # fmt: skip
    return llama_config(draw, spec, architecture, absent, more), spelled


def _spell_scale(draw, spec, rope: dict, spelled: RopeSpec) -> RopeSpec:
    """With mscale_all_dim, where the spec has a scale of scores; the rope that it makes."""
    inner = rope.get("rope_scaling") or rope.get("rope_parameters")
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        inner.pop(name, None)
    factor = inner["factor"] = spec.rope.factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if not spec.attention_scale:
        return replace(spelled, factor=factor, attention_factor=scale(1.0))
    all_dim = next(
        w for w in (0.707, 1.0) if scale_of(spec.rope, spec.head_dim, w) == spec.attention_scale
    )
    mscale = all_dim if spec.max_positions == 512 else draw.one((all_dim, 1.3))
    inner |= {"mscale": mscale, "mscale_all_dim": all_dim}
    return replace(spelled, factor=factor, attention_factor=scale(mscale) / scale(all_dim))


def tensors(draw, spec, weights) -> dict:
    return glm4_moe.tensors(draw, spec, weights, _attention)


def _attention(spec, bundle) -> dict:
    """What checkpoints have in place of the segments of a latent's heads: numbers that are rotated
    come last, the two of a pair next to each other; matrices of latents are one."""
    found = {
        f"{_OWN_NAMES[stem_and_kind(name)[0]]}.{stem_and_kind(name)[1]}": values
        for name, values in bundle.items()
        if stem_and_kind(name)[0] in _OWN_NAMES
    }
    q = _by_head(spec, bundle["q"])
    q = np.concatenate([q[:, spec.rope.dims :], _in_pairs(q[:, : spec.rope.dims], 1)], axis=1)
    name = "q_b_proj" if spec.q_rank else "q_proj"
    found[f"self_attn.{name}.weight"] = q.reshape(bundle["q"].shape)
    for kind, bias in (("weight", ""), ("bias", "_bias")):
        if f"k{bias}" in bundle:
            both = [bundle[f"latent{bias}"], _in_pairs(bundle[f"k{bias}"], 0)]
            found[f"self_attn.kv_a_proj_with_mqa.{kind}"] = np.concatenate(both)
    keys, values = (_by_head(spec, bundle[name]) for name in ("absorb", "expand"))
    both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
    found["self_attn.kv_b_proj.weight"] = both.reshape(-1, spec.latent)
    return found


def _by_head(spec, matrix: np.ndarray) -> np.ndarray:
    return matrix.reshape(spec.n_heads, -1, matrix.shape[1])


def _in_pairs(values: np.ndarray, axis: int) -> np.ndarray:
    """Element i of the first half and element i of the second next to each other."""
    halves = np.split(values, 2, axis=axis)
    return np.stack(halves, axis=axis + 1).reshape(values.shape)


# ---- GGUF --------------------------------------------------------------------------------------


def gguf_facts(seed: int) -> dict:
    rope = (RopeSpec(dims=8), RopeSpec("yarn", 10000.0, 8.0, 64, dims=8))[seed // 2 % 2]
    return {
        "activation": "silu", "n_layers": 2, "routed": (False, True), "windows": (0, 0),
        "routed_scale": 2.5, "max_positions": 512, "rope": rope, "head_dim": 24,
        "attention_scale": scale_of(rope, 24, 0.707 if rope.type == "yarn" else 0),
        "n_heads": 3 + seed % 2,
    }  # fmt: skip


def older(spec) -> bool:
    """Whether its GGUF is as llama.cpp's converter wrote them until 2025."""
    return spec.n_heads % 2 == 1


def gguf_keys(writer, spec) -> None:
    if older(spec):
        sizes = {
            "key_length": spec.head_dim,
            "value_length": spec.value_dim,
            "head_count_kv": spec.n_heads,
        }
        for name, value in sizes.items():
            writer.kv_data[0][f"{GGUF}.attention.{name}"].value = value
    else:
        writer.add_key_length_mla(spec.head_dim)
        writer.add_value_length_mla(spec.value_dim)
    writer.add_kv_lora_rank(spec.latent)
    if spec.q_rank:
        writer.add_q_lora_rank(spec.q_rank)
    writer.add_leading_dense_block_count(spec.routed.index(True))
    writer.add_expert_shared_count(spec.shared_intermediate // spec.expert_intermediate)
    writer.add_expert_weights_scale(spec.routed_scale)
    gating = (
        gguf.ExpertGatingFuncType.SIGMOID if spec.router_bias else gguf.ExpertGatingFuncType.SOFTMAX
    )
    if spec.router_bias or not older(spec):
        writer.add_expert_gating_func(gating)
    if spec.n_groups:
        writer.add_expert_group_count(spec.n_groups)
        writer.add_expert_group_used_count(spec.top_groups)
    if spec.rope.type == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * 0.707)


def gguf_tensors(spec, weights) -> dict:
    own = ("q_down", "q_down_norm", "latent_norm", "q", "k", "latent", "absorb", "expand")
    names = GGUF_NAMES | {name: name for name in own}
    found = gguf_layers(spec, weights, names)
    found = {n.replace("ffn_gate_inp.bias", "exp_probs_b.bias"): v for n, v in found.items()}
    theirs = {
        "q_a_proj": "attn_q_a", "q_a_layernorm": "attn_q_a_norm", "q_b_proj": "attn_q_b",
        "q_proj": "attn_q", "kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "kv_a_layernorm": "attn_kv_a_norm", "kv_b_proj": "attn_kv_b",
    }  # fmt: skip
    for layer in range(spec.n_layers):
        base = f"blk.{layer}."
        for name in own:
            for kind in ("weight", "bias"):
                found.pop(f"{base}{name}.{kind}", None)
        bundle = weights.dense(layer)
        for name, values in _attention(spec, bundle).items():
            _, stem, kind = name.split(".")
            found[f"{base}{theirs[stem]}.{kind}"] = values
        if not older(spec):
            del found[f"{base}attn_kv_b.weight"]
            found[f"{base}attn_k_b.weight"] = _by_head(spec, bundle["absorb"])
            found[f"{base}attn_v_b.weight"] = _by_head(spec, bundle["expand"])
    return found
