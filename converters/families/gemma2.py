"""Gemma 2: norms whose weight counts from 1, before and after each block; capped scores and logits.

Source: modeling_gemma2.py in transformers.
"""

import math
from dataclasses import replace

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from .. import naming
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source

DEFAULTS = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True,
    "rope_theta": 10000.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "attention_bias": False, "use_bidirectional_attention": False,
}  # fmt: skip
KEYS = {"hidden_act": "hidden_activation"}
_CAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
_NORMS = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "ffn_post_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec: every second layer slides, from the first on."""
    layers = keys.count("num_hidden_layers")
    return common_facts(keys, hidden, [i % 2 == 0 for i in range(layers)]) | {
        "rope": keys.rope(), "logit_cap": cap(keys, "final_logit_softcapping", _CAPS),
        "attention_cap": cap(keys, "attn_logit_softcapping", _CAPS),
    }  # fmt: skip


def common_facts(keys, hidden: int, sliding: list[bool]) -> dict:
    """Those of all Gemmas; `sliding`: which layers do where the config does not list them."""
    if keys.flag("use_bidirectional_attention"):
        raise UnsupportedError("config.json: use_bidirectional_attention = true is not supported")
    scalar, listed, window = keys.count("query_pre_attn_scalar"), keys.sliding_layers(), 0
    sliding = sliding if listed is None else listed
    if scalar < 1:
        raise CheckpointError("config.json: query_pre_attn_scalar = 0 is out of range")
    if any(sliding):
        window = keys.window()
    return {
        "n_kv_heads": keys.count("num_key_value_heads"), "head_dim": keys.count("head_dim"),
        "intermediate": keys.count("intermediate_size"), "post_norms": True,
        "norm_eps": keys.number("rms_norm_eps", 1e-6), "embedding_scale": math.sqrt(hidden),
        "attention_scale": 1 / math.sqrt(scalar),
        "windows": tuple(window * slides for slides in sliding),
    }  # fmt: skip


def cap(keys, name: str, defaults: dict) -> float:
    """A cap of the config, which null takes off."""
    if name in keys.config and keys.config[name] is None:
        return 0.0
    value = keys.number(name, defaults.get(name, 0.0))
    if name in keys.config and value <= 0:
        raise CheckpointError(f"config.json: {name} = {value} is out of range; use null for no cap")
    return value


def biases(keys) -> frozenset[str]:
    """Those of attention, all or none."""
    every = {"q_bias", "k_bias", "v_bias", "o_bias"}
    return frozenset(every if keys.flag("attention_bias") else ())


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is. GGUF files have 1 added to norms already."""
    last = layer == spec.n_layers
    if not last and part.name not in _NORMS:
        return naming.sources(spec, prefix, kind, layer, index, part)
    name = f"{prefix}norm" if last else f"{prefix}layers.{layer}.{_NORMS[part.name]}"
    plain = Source(f"{name}.weight", (part.cols,), plus=1.0)
    return [plain, replace(plain, tensor=f"{name}.plus_one.weight", plus=0.0)]
