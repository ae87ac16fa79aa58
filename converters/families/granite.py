"""Granite and GraniteMoE: Llama's names, and multipliers of what flows (arXiv 2408.13359).

Source: modeling_granite.py and modeling_granitemoe.py in transformers.
"""

from edgemem.errors import CheckpointError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from .. import naming
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source

DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
}  # fmt: skip
KEYS: dict[str, str] = {}
_SCALES = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec; logits are divided by their scale."""
    scales = {name: keys.number(name, 1.0) for name in _SCALES}
    for name, value in scales.items():
        if not 1e-6 <= value <= 1e6:
            raise CheckpointError(f"config.json: {name} = {value} is out of range")
    return {
        "n_kv_heads": keys.kv_heads(heads), "head_dim": keys.count("head_dim", hidden // heads),
        "intermediate": keys.count("intermediate_size"), "rope": keys.rope(),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "embedding_scale": scales["embedding_multiplier"],
        "residual_scale": scales["residual_multiplier"],
        "attention_scale": scales["attention_multiplier"],
        "logit_scale": 1.0 / scales["logits_scaling"],
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """Those of attention, and those of the FFN: all or none."""
    found = {"q_bias", "k_bias", "v_bias", "o_bias"} if keys.flag("attention_bias") else set()
    if keys.flag("mlp_bias"):
        found |= {"gate_bias", "up_bias", "down_bias"}
    return frozenset(found)


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is."""
    return naming.sources(spec, prefix, kind, layer, index, part)
