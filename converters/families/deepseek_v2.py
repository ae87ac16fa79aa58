"""DeepSeek-V2 and V2-Lite: keys and values of all heads made of one latent, which is small; experts
behind some dense layers, and shared experts without a gate.

Source: modeling_deepseek_v2.py in transformers. What its attention multiplies latents by is one
tensor for keys and values together (kv_b_proj), or two in GGUF files, where that for keys is
turned around in each head already; a store has the two.
"""

import math
from dataclasses import dataclass

import numpy as np

from edgemem.dtypes import F32, DType
from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import HEAD_STEP, ModelSpec, RopeSpec

from .. import blocks
from ..checkpoint import Tensor
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source
from ..rope import finite, yarn_mscale
from . import glm4_moe

DEFAULTS = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "first_k_dense_replace": 0,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "topk_method": "greedy",
    "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1,
    "rope_interleave": True,
}  # fmt: skip
KEYS: dict[str, str] = {}
_METHODS = ("greedy", "group_limited_greedy")
_NAMES = {
    "q_down": "q_a_proj", "q_down_norm": "q_a_layernorm", "latent_norm": "kv_a_layernorm",
}  # fmt: skip


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    found = common_facts(keys)
    method = keys.get("topk_method", (str,), "a name")
    if method not in _METHODS:
        raise UnsupportedError(
            f"config.json: topk_method = {method!r:.80} is not supported for {keys.model_type}; "
            f"supported are {', '.join(_METHODS)}"
        )
    if keys.flag("norm_topk_prob"):
        raise UnsupportedError(
            "config.json: norm_topk_prob = true is not supported for deepseek_v2; implementations "
            "disagree about what it means"
        )
    if not any(found["routed"]):
        return found
    groups = method == "group_limited_greedy" and keys.count("n_group") > 1
    return found | experts(keys, groups, "softmax")


def common_facts(keys) -> dict:
    """Those that DeepSeek-V3 has too, but for its experts. num_key_value_heads means nothing."""
    for name in ("mlp_bias", "rope_interleave"):
        if keys.flag(name) != DEFAULTS[name]:
            said = "false" if DEFAULTS[name] else "true"
            raise UnsupportedError(f"config.json: {name} = {said} is not supported here")
    if keys.count("moe_layer_freq") != 1:
        raise UnsupportedError("config.json: moe_layer_freq is not supported but for 1")
    scoring = keys.get("scoring_func", (str,), "a name")
    own = "softmax" if keys.model_type == "deepseek_v2" else "sigmoid"
    if scoring not in (None, own):
        raise UnsupportedError(
            f"config.json: scoring_func = {scoring!r:.80} is not supported for {keys.model_type}; "
            f"supported is {own}"
        )
    layers, dense = keys.count("num_hidden_layers"), keys.count("first_k_dense_replace")
    rotated, plain = keys.count("qk_rope_head_dim"), keys.count("qk_nope_head_dim")
    rope = _rope(keys, rotated, plain)
    # Null has a meaning of its own: queries are made directly.
    narrow = keys.config.get("q_lora_rank", 0) is not None
    return {
        "n_kv_heads": 1, "head_dim": rotated + plain, "rope": rope,
        "latent": _whole_groups(keys, "kv_lora_rank"),
        "value_dim": _whole_groups(keys, "v_head_dim"),
        "q_rank": keys.count("q_lora_rank") if narrow else 0,
        "attention_scale": _attention_scale(keys, rope, rotated + plain),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "intermediate": keys.count("intermediate_size"),
        "routed": tuple(i >= dense for i in range(layers)),
    }  # fmt: skip


def _rope(keys, rotated: int, plain: int) -> RopeSpec:
    if rotated < 2 or rotated % 2 or plain < 1:
        raise CheckpointError(
            f"config.json: qk_rope_head_dim = {rotated} with qk_nope_head_dim = {plain} is out of "
            "range"
        )
    rope = keys.rope()
    return RopeSpec(**rope.__dict__ | {"dims": rotated})


def _whole_groups(keys, name: str) -> int:
    size = keys.count(name)
    if size < 1 or size % HEAD_STEP:
        raise UnsupportedError(
            f"config.json: {name} = {size} is not supported; supported are multiples of {HEAD_STEP}"
        )
    return size


def _attention_scale(keys, rope: RopeSpec, head_dim: int) -> float:
    """0 for what follows from the size of a head."""
    said = keys.config.get("rope_scaling") or keys.config.get("rope_parameters") or {}
    all_dim = said.get("mscale_all_dim") or 0
    if rope.type == "default" or not all_dim:
        return 0.0
    return yarn_mscale(rope.factor, finite("mscale_all_dim", all_dim)) ** 2 / math.sqrt(head_dim)


def experts(keys, groups: bool, scoring: str) -> dict:
    """Fields about experts, chosen in groups or not."""
    width = keys.count("moe_intermediate_size")
    found = {"n_groups": keys.count("n_group"), "top_groups": keys.count("topk_group")}
    return (found if groups else {}) | {
        "n_experts": keys.count("n_routed_experts"), "top_k": keys.count("num_experts_per_tok"),
        "expert_intermediate": width, "shared_gated": False, "scoring": scoring,
        "shared_intermediate": width * keys.count("n_shared_experts"),
        "normalize_top_k": keys.flag("norm_topk_prob"), "router_bias": scoring == "sigmoid",
        "routed_scale": keys.number("routed_scaling_factor", 1.0),
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """Those of attention, all or none; what is made of narrow queries and latents has none."""
    every = {"q_down_bias", "k_bias", "latent_bias", "o_bias"}
    return frozenset(every if keys.flag("attention_bias") else ())


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is. Numbers that are rotated come first, and halves of pairs apart, where the
    checkpoint has them last, and halves next to each other."""
    if kind != Kind.DENSE or layer == spec.n_layers:
        return glm4_moe.sources(spec, prefix, kind, layer, index, part)
    attention, stem = f"{prefix}layers.{layer}.self_attn.", part.name.removesuffix("_bias")
    parameter = "weight" if stem == part.name else "bias"
    vector, dims, plain = part.lanes == 1, spec.rope.dims, spec.head_dim - spec.rope.dims
    halves = (*range(0, dims, 2), *range(1, dims, 2))
    if stem == "q":
        name, order = "q_b_proj" if spec.q_rank else "q_proj", tuple(plain + i for i in halves)
        return [
            Source(
                f"{attention}{name}.weight", (part.rows, part.cols), run=spec.head_dim,
                stride=spec.head_dim, order=(*order, *range(plain)),
            )
        ]  # fmt: skip
    if stem in ("k", "latent"):
        rows = spec.latent + dims
        shape = (rows,) if vector else (rows, part.cols)
        tensor, items = f"{attention}kv_a_proj_with_mqa.{parameter}", part.cols if vector else 0
        if stem == "latent":
            return [Source(tensor, shape, items=items)]
        return [Source(tensor, shape, spec.latent, dims, dims, items, order=halves)]
    if stem in ("absorb", "expand"):
        return _of_latents(spec, attention, part, plain)
    if stem in _NAMES:
        shape = (part.cols,) if vector else (part.rows, part.cols)
        return [Source(f"{attention}{_NAMES[stem]}.{parameter}", shape)]
    return glm4_moe.sources(spec, prefix, kind, layer, index, part)


def _of_latents(spec: ModelSpec, attention: str, part: Part, plain: int) -> list[Source]:
    heads, value, latent = spec.n_heads, spec.value_dim, spec.latent
    both = f"{attention}kv_b_proj.weight", (heads * (plain + value), latent)
    if part.name == "absorb":
        own = Source(f"{attention}k_b_proj.weight", (heads, latent, plain))
        return [own, TurnedHeads(*both, run=plain, stride=plain + value)]
    own = Source(f"{attention}v_b_proj.weight", (heads, value, latent))
    return [own, Source(*both, plain, value, plain + value)]


@dataclass(frozen=True)
class TurnedHeads(Source):
    """Columns of each run of rows, one run after the other. Blocks go along rows: of those there
    remain the numbers, in 32 bits."""

    def dtype(self, tensor: Tensor) -> DType:
        return F32 if tensor.dtype.is_block else tensor.dtype

    def read(self, tensor: Tensor, first: int, count: int) -> tuple[np.ndarray, DType]:
        cols, end, found = tensor.shape[-1], first + count, []
        for run in range(first // cols, -(-end // cols)):
            rows = tensor.read_rows(self.first_row + run * self.stride, self.run)
            if tensor.dtype.is_block:
                rows = blocks.dequantize(rows, tensor.dtype).view(np.uint32)
            found.append(rows.T[max(first - run * cols, 0) : end - run * cols])
        return np.concatenate(found), self.dtype(tensor)
