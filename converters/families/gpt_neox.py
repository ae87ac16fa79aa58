"""GPT-NeoX and Pythia: a part of each head rotated, attention beside the FFN, LayerNorm, biases.

Source: modeling_gpt_neox.py in transformers.
"""

from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from ..naming import Source
from ..rope import finite, read_rope
from .heads import head_size

DEFAULTS = {
    "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
    "num_attention_heads": 64, "hidden_act": "gelu", "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False,
    "use_parallel_residual": True, "attention_bias": True, "rotary_pct": 0.25,
    "rotary_emb_base": 10000.0,
}  # fmt: skip
KEYS: dict[str, str] = {}
ARCHITECTURE = "GPTNeoXForCausalLM"
EMBED, HEAD, PREFIXES = "embed_in.weight", ("embed_out.weight", "lm_head.weight"), ("gpt_neox.", "")

_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
}  # fmt: skip


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    head_dim = head_size(hidden, heads)
    rope = keys.config.get("rope_scaling") or keys.config.get("rope_parameters") or {}
    if isinstance(rope, dict) and rope.get("partial_rotary_factor") is None:
        rope = rope | {"partial_rotary_factor": keys.number("rotary_pct", 0.25)}
    theta = finite("rotary_emb_base", keys.number("rotary_emb_base", 1e4))
    return {
        "n_kv_heads": heads, "head_dim": head_dim, "rope": read_rope(keys, rope, theta, head_dim),
        "intermediate": keys.count("intermediate_size"), "norm": "layer", "gated": False,
        "norm_eps": keys.number("layer_norm_eps", 1e-5),
        "parallel": keys.flag("use_parallel_residual"),
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """Those of the FFN, and those of attention, all or none."""
    attention = {"q_bias", "k_bias", "v_bias", "o_bias"} if keys.flag("attention_bias") else set()
    return frozenset({"up_bias", "down_bias"} | attention)


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is. A head's rows of q, k and v follow each other; in GGUF files all of q
    come before all of k."""
    stem = part.name.removesuffix("_bias")
    parameter = "weight" if stem == part.name else "bias"
    if layer == spec.n_layers:
        return [Source(f"{prefix}final_layer_norm.{parameter}", (part.cols,))]
    base, size, all_rows = f"{prefix}layers.{layer}.", spec.head_dim, 3 * spec.hidden
    if stem in ("q", "k", "v"):
        vector = parameter == "bias"
        shape, items = ((all_rows,), part.cols) if vector else ((all_rows, part.cols), 0)
        name, place = f"{base}attention.query_key_value", "qkv".index(stem)
        return [
            Source(f"{name}.{parameter}", shape, place * size, size, 3 * size, items),
            Source(f"{name}.apart.{parameter}", shape, place * spec.hidden, items=items),
        ]
    shape = (part.cols,) if part.lanes == 1 else (part.rows, part.cols)
    return [Source(f"{base}{_NAMES[stem]}.{parameter}", shape)]
