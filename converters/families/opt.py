"""OPT: fairseq's names, positions that are learned, biases that are all there or none."""

import json

from edgemem.errors import UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec, RopeSpec

from ..naming import HEAD as HEAD
from ..naming import Source
from .heads import head_size

DEFAULTS = {
    "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
    "max_position_embeddings": 2048, "num_attention_heads": 12, "activation_function": "relu",
    "bos_token_id": 2, "eos_token_id": 2, "tie_word_embeddings": True,
    "enable_bias": True, "do_layer_norm_before": True, "layer_norm_elementwise_affine": True,
}  # fmt: skip
KEYS = {"hidden_act": "activation_function"}
EMBED = "embed_tokens.weight"
PREFIXES = ("model.decoder.", "decoder.", "")

_EPS = 1e-5
"""torch's default for LayerNorm, which no OPT changes."""
FIRST_POSITION = 2
"""The row of position 0: what fairseq kept for padding comes before it."""
_NAMES = {
    "norm": "final_layer_norm", "attn_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.out_proj", "up": "fc1", "down": "fc2",
}  # fmt: skip


def facts(keys, hidden: int, heads: int) -> dict:
    """Refuses what a config may say and models/opt.py does not compute: norms after each block and
    embeddings of another width (opt-350m), norms without weights."""
    told = {
        "do_layer_norm_before": (keys.flag("do_layer_norm_before"), True),
        "layer_norm_elementwise_affine": (keys.flag("layer_norm_elementwise_affine"), True),
        "_remove_final_layer_norm": (keys.flag("_remove_final_layer_norm"), False),
        "word_embed_proj_dim": (keys.count("word_embed_proj_dim", hidden), hidden),
    }
    for name, (value, supported) in told.items():
        if value != supported:
            raise UnsupportedError(
                f"config.json: {name} = {json.dumps(value)} is not supported; "
                f"supported is {json.dumps(supported)}"
            )
    return {
        "n_kv_heads": heads, "head_dim": head_size(hidden, heads),
        "intermediate": keys.count("ffn_dim"), "rope": RopeSpec(), "norm": "layer",
        "norm_eps": _EPS, "positions": "learned", "gated": False,
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """All that there can be, or none."""
    every = {f"{name}_bias" for name in ("q", "k", "v", "o", "up", "down")}
    return frozenset(every if keys.flag("enable_bias") else ())


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is."""
    if part.name == "positions":
        shape = (part.rows + FIRST_POSITION, part.cols)
        return [Source(f"{prefix}embed_positions.weight", shape, FIRST_POSITION)]
    shape = (part.cols,) if part.lanes == 1 else (part.rows, part.cols)
    stem, bias = part.name.removesuffix("_bias"), part.name.endswith("_bias")
    base = prefix if layer == spec.n_layers else f"{prefix}layers.{layer}."
    return [Source(f"{base}{_NAMES[stem]}.{'bias' if bias else 'weight'}", shape)]
