"""Gemma 2: norms that count from 1, before and after each block; caps; layers that slide."""

import math
from dataclasses import replace

import numpy as np
from tiny_config import spell_rope

from .drawing import LLAMA_NAMES, config as llama_config
from .drawing import gated, gguf_layers, gguf_rope, stem_and_kind, tables, with_rope

ARCHITECTURE = "Gemma2ForCausalLM"
GGUF = "gemma2"
NORMS = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "ffn_post_norm": "post_feedforward_layernorm",
}  # fmt: skip
_ABSENT = {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256,
    "use_bidirectional_attention": False, "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip


def spec(draw, vocab_size: int):
    plain, rule = shape(draw, "gemma2", vocab_size), draw.maybe(0.6)
    window = draw.one((1, 3, 8, 16, 4096))
    sliding = [i % 2 == 0 if rule else draw.maybe(0.5) for i in range(plain.n_layers)]
    plain = replace(
        plain, windows=tuple(window * slides for slides in sliding),
        attention_cap=draw.one((0.0, 50.0, draw.real(0.5, 3.0))),
        logit_cap=draw.one((0.0, 30.0, draw.real(6.0, 15.0))),
    )  # fmt: skip
    return with_rope(draw, plain)


def shape(draw, model_type: str, vocab_size: int):
    plain = gated(draw, model_type, vocab_size, tied=draw.maybe(0.6), post_norms=True)
    heads = plain.n_heads
    hidden = heads * draw.whole(1 + 23 // heads, 1 + 48 // heads)
    return replace(
        plain, hidden=hidden, embedding_scale=math.sqrt(hidden),
        attention_scale=1 / math.sqrt(draw.one((plain.head_dim, 256, 7))),
        activation="gelu_tanh" if draw.maybe(0.6) else plain.activation,
    )  # fmt: skip


def biases(draw) -> dict:
    some = draw.maybe(0.3)
    return {"qkv": some, "o": some, "mlp": False}


def config(draw, spec, biases: dict):
    rope, spelled = spell_rope(draw, spec)
    more = rope | {
        "attn_logit_softcapping": spec.attention_cap or None,
        **sliding(draw, spec, [i % 2 == 0 for i in range(spec.n_layers)]),
    }
    return common_config(draw, spec, biases, ARCHITECTURE, more), spelled


def common_config(draw, spec, biases: dict, architecture: str, more: dict) -> dict:
    more = {
        "head_dim": spec.head_dim, "attention_bias": biases["qkv"],
        "query_pre_attn_scalar": round(spec.attention_scale**-2),
        "final_logit_softcapping": spec.logit_cap or None, "use_bidirectional_attention": False,
    } | more  # fmt: skip
    found = llama_config(draw, spec, architecture, {}, more)
    found["hidden_activation"] = found.pop("hidden_act")
    if draw.maybe(0.3):  # some configs have it too, and nobody reads it
        found["hidden_act"] = "relu"
    gone = {k for k, v in _ABSENT.items() if k in found and found[k] == v and draw.maybe(0.4)}
    if spec.model_type == "gemma3_text":  # has no caps unless it says so
        gone -= {"final_logit_softcapping"}
    return {key: value for key, value in found.items() if key not in gone}


def sliding(draw, spec, rule: list[bool]) -> dict:
    """The window, and which layers have it, where that is not the rule."""
    sliding = [bool(window) for window in spec.windows]
    keys = {"sliding_window": max(spec.windows) or 4096}
    if sliding == rule and draw.maybe(0.7):
        return keys
    names = {False: "full_attention", True: "sliding_attention"}
    return keys | {"layer_types": [names[slides] for slides in sliding]}


def tensors(draw, spec, weights) -> dict:
    found, one = tables(draw, spec, weights), np.float32(1)
    for (_, layer, _), bundle in weights.bundles.items():
        base = f"model.layers.{layer}."
        for name, value in bundle.items():
            stem, parameter = stem_and_kind(name)
            key = "model.norm" if stem == "norm" else base + (LLAMA_NAMES | NORMS)[stem]
            found[f"{key}.{parameter}"] = value - one if stem.endswith("norm") else value
    return found


def gguf_facts(seed: int) -> dict:
    heads, size = 4, 10
    return {
        "activation": "gelu_tanh", "n_heads": heads, "n_kv_heads": 2, "head_dim": size,
        "attention_scale": 1 / math.sqrt(size), "rope": gguf_rope(4 * seed), "tied": True,
        "hidden": 32, "embedding_scale": math.sqrt(32), "n_layers": 3, "windows": (5, 0, 5),
        "routed": (False,) * 3, "max_positions": 512,
    }  # fmt: skip


def gguf_keys(writer, spec) -> None:
    writer.add_attn_logit_softcapping(spec.attention_cap)
    writer.add_final_logit_softcapping(spec.logit_cap)


def gguf_tensors(spec, weights) -> dict:
    names = {
        "attn_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm",
        "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
        "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    }  # fmt: skip
    return gguf_layers(spec, weights, names)
