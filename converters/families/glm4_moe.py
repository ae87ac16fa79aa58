"""GLM-4.5 and its like: experts behind some dense layers, chosen in groups by biased sigmoids; a
shared expert without a gate; a part of each head rotated.

Source: modeling_glm4_moe.py in transformers.
"""

import re

from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from .. import naming
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source

DEFAULTS = {
    "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
    "num_attention_heads": 96, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "attention_bias": False,
    "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False,
}  # fmt: skip
KEYS: dict[str, str] = {}
_LAYER = re.compile(r"(?:layers|blk)\.([0-9]{1,7})\.")


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    layers, dense = keys.count("num_hidden_layers"), keys.count("first_k_dense_replace")
    head_dim, routed = keys.count("head_dim", hidden // heads), [i >= dense for i in range(layers)]
    return {
        "n_kv_heads": keys.count("num_key_value_heads"), "head_dim": head_dim,
        "rope": keys.rope(head_dim), "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "qk_norm": "head" if keys.flag("use_qk_norm") else "none", "routed": tuple(routed),
        "intermediate": keys.count("intermediate_size"), **(_experts(keys) if any(routed) else {}),
    }  # fmt: skip


def _experts(keys) -> dict:
    width, groups = keys.count("moe_intermediate_size"), keys.count("n_group")
    found = {"n_groups": groups, "top_groups": keys.count("topk_group")} if groups > 1 else {}
    return found | {
        "n_experts": keys.count("n_routed_experts"), "top_k": keys.count("num_experts_per_tok"),
        "expert_intermediate": width, "normalize_top_k": keys.flag("norm_topk_prob"),
        "shared_intermediate": width * keys.count("n_shared_experts"), "shared_gated": False,
        "scoring": "sigmoid", "router_bias": True,
        "routed_scale": keys.number("routed_scaling_factor", 1.0),
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """Those of q, k and v, all or none."""
    return frozenset({"q_bias", "k_bias", "v_bias"} if keys.flag("attention_bias") else ())


def unused(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is of the layers behind the last, which foretell tokens after the next."""
    layer = _LAYER.search(name)
    return layer is not None and int(layer[1]) >= spec.n_layers


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is."""
    base = f"{prefix}layers.{layer}.mlp."
    if part.name == "router_bias":
        names = ("gate.e_score_correction_bias", "gate.e_score_correction.bias")
        return [Source(base + name, (part.cols,)) for name in names]
    plain = naming.sources(spec, prefix, kind, layer, index, part)
    if kind != Kind.SHARED:
        return plain
    name = f"{base}shared_experts.{part.name}_proj.weight"
    return [Source(name, (part.rows, part.cols)), *plain]
