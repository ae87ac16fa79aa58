"""Phi-3.5-MoE: LayerNorm, biases in attention and output, two experts that are mixed sparsely.

Source: modeling_phimoe.py in transformers. Its longrope differs from Phi-3's: what cosines and
sines are multiplied by is said for short sequences and for long ones.
"""

from dataclasses import replace

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec, RopeSpec

from .. import naming
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source
from ..rope import finite

DEFAULTS = {
    "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "rope_theta": 1000000.0, "num_experts_per_tok": 2,
    "num_local_experts": 16, "router_jitter_noise": 0.01, "attention_bias": False,
    "lm_head_bias": False,
}  # fmt: skip
KEYS: dict[str, str] = {}
_TWO = 2


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    layers, width = keys.count("num_hidden_layers"), keys.count("intermediate_size")
    head_dim = keys.count("head_dim", hidden // heads)
    if keys.count("num_experts_per_tok") != _TWO:
        raise UnsupportedError(
            "config.json: num_experts_per_tok is not supported but for 2, which are mixed sparsely"
        )
    return {
        "n_kv_heads": keys.kv_heads(heads), "head_dim": head_dim, "rope": _rope(keys, head_dim),
        "intermediate": width, "expert_intermediate": width, "routed": (True,) * layers,
        "n_experts": keys.count("num_local_experts"), "top_k": _TWO, "scoring": "sparsemixer",
        "router_jitter": keys.number("router_jitter_noise", 0.01), "norm": "layer",
        "norm_eps": keys.number("rms_norm_eps", 1e-5), "windows": (keys.window(),) * layers,
    }  # fmt: skip


def _rope(keys, head_dim: int) -> RopeSpec:
    rope = keys.rope(head_dim)
    if rope.type not in ("default", "longrope"):
        raise UnsupportedError(
            f"config.json: the rope type {rope.type!r} is not supported for phimoe; "
            "supported are default, longrope"
        )
    if rope.dims:
        raise UnsupportedError("config.json: partial_rotary_factor is not supported for phimoe")
    if rope.type == "default":
        return rope
    said, factors = keys.config.get("rope_scaling") or keys.config["rope_parameters"], []
    for name in ("short_mscale", "long_mscale"):
        if name not in said:
            raise CheckpointError(f"config.json: the rotary embedding lacks its {name}")
        factors.append(finite(name, said[name]))
    return replace(rope, attention_factor=factors[0], long_attention_factor=factors[1])


def biases(keys) -> frozenset[str]:
    """Those of attention, all or none, and that of the output."""
    found = {"q_bias", "k_bias", "v_bias", "o_bias"} if keys.flag("attention_bias") else set()
    return frozenset(found | ({"head_bias"} if keys.flag("lm_head_bias") else set()))


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is."""
    if part.name == "head_bias":
        return [Source("lm_head.bias", (part.cols,))]
    stem = part.name.removesuffix("_bias")
    if part.name != stem and stem.endswith("norm"):
        plain = sources(spec, prefix, kind, layer, index, replace(part, name=stem))
        return [replace(s, tensor=s.tensor.removesuffix("weight") + "bias") for s in plain]
    plain = naming.sources(spec, prefix, kind, layer, index, part)
    if part.name == "router":
        name = f"{prefix}layers.{layer}.mlp.router.weight"
        return [Source(name, (part.rows, part.cols)), *plain]
    return plain
