"""GPT-NeoX: LayerNorm, no gate, a part of each head rotated, attention beside the FFN or before."""

from dataclasses import replace

import numpy as np
from tiny_config import spell_rope

from edgemem.spec import RopeSpec

from .drawing import config as llama_config
from .drawing import gguf_layers, stem_and_kind, ungated, with_rope

ARCHITECTURE = "GPTNeoXForCausalLM"
GGUF = "gptneox"
_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
    "qkv": "attention.query_key_value",
}  # fmt: skip
_ABSENT = {
    "hidden_act": "gelu", "tie_word_embeddings": False, "attention_bias": True,
    "use_parallel_residual": True, "rotary_pct": 0.25, "layer_norm_eps": 1e-5,
}  # fmt: skip


def spec(draw, vocab_size: int):
    plain = ungated(draw, "gpt_neox", vocab_size, parallel=draw.maybe(0.6))
    plain = with_rope(draw, plain)
    least = 4 if plain.rope.type == "dynamic" else 2
    dims = draw.one([0, *range(least, plain.head_dim, 2)])
    quarter = plain.head_dim // 4
    if quarter % 2 == 0 and quarter >= least and draw.maybe(0.5):
        dims = quarter
    return replace(plain, rope=replace(plain.rope, dims=dims))


def biases(draw) -> dict:
    some = draw.maybe(0.7)
    return {"qkv": some, "o": some, "mlp": True}


def config(draw, spec, biases: dict):
    keys, spelled = spell_rope(draw, spec)
    share = (spec.rope.dims or spec.head_dim) / spec.head_dim
    inner = keys.get("rope_parameters")
    if inner is not None and draw.maybe(0.5):
        inner |= {"partial_rotary_factor": share, "rope_theta": spec.rope.theta}
    else:
        keys |= {"rotary_pct": share, "rotary_emb_base": spec.rope.theta}
    keys.pop("rope_theta", None)
    if inner is not None and "rope_theta" not in inner:
        inner["rope_theta"] = spec.rope.theta
    more = keys | {
        "attention_bias": biases["qkv"], "use_parallel_residual": spec.parallel,
        "layer_norm_eps": spec.norm_eps,
    }  # fmt: skip
    found = llama_config(draw, spec, ARCHITECTURE, _ABSENT, more)
    for name in ("rms_norm_eps", "num_key_value_heads"):
        del found[name]
    return found, spelled


def tensors(draw, spec, weights) -> dict:
    found = {"gpt_neox.embed_in.weight": weights.table()}
    if not spec.tied or draw.maybe(0.2):
        found["embed_out.weight"] = weights.head()
    for (_, layer, _), bundle in weights.bundles.items():
        base = f"gpt_neox.layers.{layer}."
        for name, value in by_heads(spec, bundle).items():
            stem, parameter = stem_and_kind(name)
            key = "gpt_neox.final_layer_norm" if stem == "norm" else base + _NAMES[stem]
            found[f"{key}.{parameter}"] = value
    if draw.maybe(0.3):  # what old checkpoints carry, and is no weight
        found["gpt_neox.layers.0.attention.bias"] = np.ones((1, 1, 4, 4))
        found["gpt_neox.layers.0.attention.masked_bias"] = np.ones(1)
        found["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(2)
    return found


def by_heads(spec, bundle: dict) -> dict:
    """The bundle with q, k and v as one matrix, in which they follow each other head by head."""
    found = dict(bundle)
    for tail in ("", "_bias"):
        if f"q{tail}" in bundle:
            parts = [found.pop(f"{x}{tail}") for x in "qkv"]
            heads = [part.reshape(spec.n_heads, spec.head_dim, -1) for part in parts]
            found[f"qkv{tail}"] = np.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
    return found


def in_turn(bundle: dict) -> dict:
    """The bundle with q, k and v as one matrix, one after another."""
    found = dict(bundle)
    for tail in ("", "_bias"):
        if f"q{tail}" in bundle:
            found[f"qkv{tail}"] = np.concatenate([found.pop(f"{x}{tail}") for x in "qkv"])
    return found


def gguf_facts(seed: int) -> dict:
    return {"activation": "gelu", "max_positions": 512, "rope": RopeSpec(dims=2 * (seed % 2))}


def gguf_keys(writer, spec) -> None:
    writer.add_parallel_residual(spec.parallel)
    writer.add_layer_norm_eps(spec.norm_eps)


def gguf_tensors(spec, weights) -> dict:
    class InTurn:
        bundles = {key: in_turn(bundle) for key, bundle in weights.bundles.items()}
        table, head = weights.table, weights.head

    names = {
        "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "qkv": "attn_qkv", "o": "attn_output",
        "up": "ffn_up", "down": "ffn_down",
    }  # fmt: skip
    return gguf_layers(spec, InTurn, names)
