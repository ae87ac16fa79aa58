"""gpt-oss: experts in every layer, mostly in MXFP4; attention with sinks, in every other layer with
a window; biases everywhere.

Source: modeling_gpt_oss.py in transformers. Rows of gate and up take turns in one tensor, whose
matrices are turned around where they are floats.
"""

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec, RopeSpec

from .. import naming
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source
from ..rope import read_rope

DEFAULTS = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_theta": 150000.0, "sliding_window": 128, "attention_bias": True,
    "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
}  # fmt: skip
KEYS: dict[str, str] = {}
QUANTIZED = ("mxfp4",)
_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
"""What its activation is computed with (reference.gated)."""
_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What a config means that says nothing of positions."""


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec. A softmax over the logits of the chosen experts is one over all, made to
    add up to 1."""
    for name, value in _SWIGLU.items():
        if keys.number(name, value) != value:
            raise UnsupportedError(f"config.json: {name} is not supported but for {value}")
    layers, width = keys.count("num_hidden_layers"), keys.count("intermediate_size")
    sliding = keys.sliding_layers() or [i % 2 == 0 for i in range(layers)]
    if any(sliding) and keys.config.get("sliding_window", 0) is None:
        raise CheckpointError("config.json: sliding_window = null, but there are layers that slide")
    window = keys.window() if any(sliding) else 0
    return {
        "n_kv_heads": keys.kv_heads(heads), "head_dim": keys.count("head_dim", hidden // heads),
        "rope": _rope(keys), "norm_eps": keys.number("rms_norm_eps", 1e-5), "sinks": True,
        "windows": tuple(window * slides for slides in sliding), "activation": "clamped_swiglu",
        "routed": (True,) * layers, "intermediate": width, "expert_intermediate": width,
        "n_experts": keys.count("num_local_experts"), "top_k": keys.count("num_experts_per_tok"),
        "normalize_top_k": True,
    }  # fmt: skip


def _rope(keys) -> RopeSpec:
    told = keys.config.get("rope_scaling") or keys.config.get("rope_parameters")
    return read_rope(keys, told or _ROPE, keys.number("rope_theta", 150000.0))


def biases(keys) -> frozenset[str]:
    """Those of attention, all or none, of routers and of experts."""
    attention = {"q_bias", "k_bias", "v_bias", "o_bias"} if keys.flag("attention_bias") else set()
    return frozenset(attention | {"router_logit_bias", "gate_bias", "up_bias", "down_bias"})


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is: in the names of the hub, or in those that GGUF files are given."""
    base, stem = f"{prefix}layers.{layer}.", part.name.removesuffix("_bias")
    if kind == Kind.EXPERT:
        experts, biased = f"{base}mlp.experts.", stem != part.name
        return (_biases if biased else _matrices)(spec, experts, index, stem)
    if part.name == "sinks":
        names = ("sinks", "sinks.weight")
        return [Source(f"{base}self_attn.{name}", (part.cols,)) for name in names]
    if part.name == "router":
        return [Source(f"{base}mlp.router.weight", (part.rows, part.cols))]
    if part.name == "router_logit_bias":
        return [Source(f"{base}mlp.router.bias", (part.cols,))]
    return naming.sources(spec, prefix, kind, layer, index, part)


def _matrices(spec: ModelSpec, base: str, expert: int, name: str) -> list[Source]:
    """Blocks; floats, turned around; gate and up apart."""
    experts, hidden, width = spec.n_experts, spec.hidden, spec.expert_intermediate
    if name == "down":
        rows, cols, fused, step = hidden, width, "down_proj", 1
    else:
        rows, cols, fused, step = width, hidden, "gate_up_proj", 2
    first = expert * step * rows + (name == "up")
    return [
        Source(f"{base}{fused}_blocks", (experts, step * rows, cols), first, step=step),
        Source(f"{base}{fused}", (experts, cols, step * rows), first, step=step, transposed=True),
        Source(f"{base}{name}_proj.weight", (experts, rows, cols), expert * rows),
    ]


def _biases(spec: ModelSpec, base: str, expert: int, name: str) -> list[Source]:
    experts, items = spec.n_experts, spec.hidden if name == "down" else spec.expert_intermediate
    fused, step = ("down_proj", 1) if name == "down" else ("gate_up_proj", 2)
    first, shape = expert * step * items + (name == "up"), (experts, step * items)
    return [
        Source(f"{base}{fused}_bias", shape, first, step=step, items=items),
        Source(f"{base}{name}_proj.bias", (experts, items), expert * items, items=items),
    ]
