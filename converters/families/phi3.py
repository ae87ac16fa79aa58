"""Phi-3 and Phi-4 mini: one matrix for queries, keys and values, one for gate and up, longrope.

Source: modeling_phi3.py in transformers.
"""

from edgemem.errors import UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from .. import naming
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source

DEFAULTS = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 32000, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
KEYS: dict[str, str] = {}


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    head_dim, layers = keys.count("head_dim", hidden // heads), keys.count("num_hidden_layers")
    rope = keys.rope(head_dim)
    if rope.type not in ("default", "longrope"):
        raise UnsupportedError(
            f"config.json: the rope type {rope.type!r} is not supported for {keys.model_type}; "
            "supported are default, longrope"
        )
    return {
        "n_kv_heads": keys.kv_heads(heads), "head_dim": head_dim, "rope": rope,
        "intermediate": keys.count("intermediate_size"),
        "norm_eps": keys.number("rms_norm_eps", 1e-5), "windows": (keys.window(),) * layers,
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """There are none."""
    return frozenset()


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is."""
    base, cols = f"{prefix}layers.{layer}.", part.cols
    q_rows, kv_rows = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    if part.name in ("q", "k", "v"):
        first = {"q": 0, "k": q_rows, "v": q_rows + kv_rows}[part.name]
        return [Source(f"{base}self_attn.qkv_proj.weight", (q_rows + 2 * kv_rows, cols), first)]
    if part.name in ("gate", "up"):
        first = part.rows * (part.name == "up")
        return [Source(f"{base}mlp.gate_up_proj.weight", (2 * part.rows, cols), first)]
    return naming.sources(spec, prefix, kind, layer, index, part)
