"""Falcon: BLOOM's names, one matrix for queries, keys and values, attention beside the FFN."""

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from ..naming import HEAD as HEAD
from ..naming import Source
from .heads import head_size

DEFAULTS = {
    "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
    "layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "bos_token_id": 11, "eos_token_id": 11, "tie_word_embeddings": True, "activation": "gelu",
    "alibi": False, "bias": False, "multi_query": True, "parallel_attn": True,
    "new_decoder_architecture": False,
}  # fmt: skip
KEYS = {"hidden_act": "activation"}
EMBED = "word_embeddings.weight"
PREFIXES = ("transformer.", "")

_NAMES = {"o": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def facts(keys, hidden: int, heads: int) -> dict:
    """Source: FalconDecoderLayer and FalconAttention in transformers' modeling_falcon.py."""
    if keys.count("n_embed", hidden) != hidden:
        raise UnsupportedError("config.json: n_embed beside another hidden_size is not supported")
    new, parallel = keys.flag("new_decoder_architecture"), keys.flag("parallel_attn")
    for name in ("alibi", "bias"):
        if keys.flag(name):
            raise UnsupportedError(f"config.json: {name} = true is not supported for falcon")
    if new and not parallel:
        raise UnsupportedError(
            "config.json: new_decoder_architecture without parallel_attn is not supported"
        )
    norms = keys.count("num_ln_in_parallel_attn", 2 if new else 1)
    if parallel and norms not in ((1, 2) if new else (1,)):
        raise UnsupportedError(
            f"config.json: num_ln_in_parallel_attn = {norms} is not supported here"
        )
    return {
        "n_kv_heads": _kv_heads(keys, heads, new), "head_dim": head_size(hidden, heads),
        "intermediate": keys.count("ffn_hidden_size", 4 * hidden), "rope": keys.rope(),
        "norm": "layer", "norm_eps": keys.number("layer_norm_epsilon", 1e-5), "gated": False,
        "parallel": parallel, "shared_norm": parallel and norms == 1,
    }  # fmt: skip


def _kv_heads(keys, heads: int, new: bool) -> int:
    if not new and keys.flag("multi_query"):
        return 1
    found = keys.count("num_kv_heads", heads)
    if found < 1 or heads % found or (found != heads and not new):
        raise CheckpointError(f"config.json: num_kv_heads = {found} does not fit {heads} heads")
    return found


def biases(keys) -> frozenset[str]:
    """None: `facts` refuses those that have some."""
    return frozenset()


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is."""
    if layer == spec.n_layers:
        return [Source(f"{prefix}ln_f.{_parameter(part)}", (part.cols,))]
    base, stem = f"{prefix}h.{layer}.", part.name.removesuffix("_bias")
    if stem in ("q", "k", "v"):
        return [_in_groups(spec, f"{base}self_attention.query_key_value.{_parameter(part)}", part)]
    shape = (part.cols,) if part.lanes == 1 else (part.rows, part.cols)
    name = _NAMES.get(stem) or _norm(spec, part)
    return [Source(f"{base}{name}.{_parameter(part)}", shape)]


def _in_groups(spec: ModelSpec, tensor: str, part: Part) -> Source:
    """A group has the rows of the query heads that share keys, of those keys and their values."""
    size, per_group = spec.head_dim, spec.n_heads // spec.n_kv_heads
    stride = (per_group + 2) * size
    first = {"q": 0, "k": per_group * size, "v": (per_group + 1) * size}[part.name[0]]
    run = per_group * size if part.name[0] == "q" else size
    return Source(tensor, (spec.n_kv_heads * stride, part.cols), first, run, stride)


def _parameter(part: Part) -> str:
    return "bias" if part.name.endswith("_bias") else "weight"


def _norm(spec: ModelSpec, part: Part) -> str:
    before_ffn = part.name.startswith("ffn_norm")
    if spec.parallel and not spec.shared_norm:
        return "ln_mlp" if before_ffn else "ln_attn"
    return "post_attention_layernorm" if before_ffn else "input_layernorm"
