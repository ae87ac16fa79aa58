"""GPT-2: learned positions, LayerNorm, biases everywhere, matrices that are stored turned around.

Source: modeling_gpt2.py in transformers.
"""

from edgemem.errors import UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec, RopeSpec

from ..naming import HEAD as HEAD
from ..naming import Source
from .heads import head_size

DEFAULTS = {
    "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256,
    "eos_token_id": 50256, "tie_word_embeddings": True, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip
KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
}  # fmt: skip
ARCHITECTURE = "GPT2LMHeadModel"
EMBED, PREFIXES = "wte.weight", ("transformer.", "")

_NORMS = {"attn_norm": "ln_1", "ffn_norm": "ln_2", "norm": "ln_f"}
_MATRICES = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if keys.flag(name):
            raise UnsupportedError(f"config.json: {name} = true is not supported")
    return {
        "n_kv_heads": heads, "head_dim": head_size(hidden, heads), "rope": RopeSpec(),
        "intermediate": keys.count("n_inner", 4 * hidden), "positions": "learned",
        "norm": "layer", "norm_eps": keys.number("layer_norm_epsilon", 1e-5), "gated": False,
        "attention_scale": 0.0 if keys.flag("scale_attn_weights") else 1.0,
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """All that there can be."""
    return frozenset(f"{name}_bias" for name in ("q", "k", "v", "o", "up", "down"))


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is. GGUF files have matrices as other models do."""
    if part.name == "positions":
        return [Source(f"{prefix}wpe.weight", (part.rows, part.cols))]
    stem = part.name.removesuffix("_bias")
    parameter = "weight" if stem == part.name else "bias"
    base = prefix if layer == spec.n_layers else f"{prefix}h.{layer}."
    if stem in _NORMS:
        return [Source(f"{base}{_NORMS[stem]}.{parameter}", (part.cols,))]
    rows, first, name = part.rows, 0, _MATRICES.get(stem)
    if name is None:
        rows, first, name = 3 * spec.hidden, "qkv".index(stem) * spec.hidden, "attn.c_attn"
    names = [f"{base}{name}.{parameter}", f"{base}{name}.turned.{parameter}"]
    if parameter == "bias":
        shape = (3 * spec.hidden,) if name == "attn.c_attn" else (part.cols,)
        return [Source(each, shape, first, items=part.cols) for each in names]
    return [
        Source(names[0], (part.cols, rows), first, transposed=True),
        Source(names[1], (rows, part.cols), first),
    ]
