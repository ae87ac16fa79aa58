"""GPT-2: learned positions, biases everywhere, matrices turned around."""

from dataclasses import replace

import numpy as np

from . import gpt_neox
from .drawing import stem_and_kind, ungated, without
from tiny_config import ACTIVATION_NAMES

ARCHITECTURE = "GPT2LMHeadModel"
GGUF = "gpt2"
_NAMES = {
    "attn_norm": "ln_1", "ffn_norm": "ln_2", "norm": "ln_f", "qkv": "attn.c_attn",
    "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj",
}  # fmt: skip
_ABSENT = {
    "activation_function": "gelu_new", "tie_word_embeddings": True, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "layer_norm_epsilon": 1e-5, "n_inner": None,
}  # fmt: skip


def spec(draw, vocab_size: int):
    plain = ungated(draw, "gpt2", vocab_size, positions="learned", tied=draw.maybe(0.7))
    plain = replace(plain, attention_scale=draw.one((0.0, 0.0, 1.0)))
    return replace(plain, intermediate=4 * plain.hidden) if draw.maybe(0.3) else plain


def biases(draw) -> dict:
    return {"qkv": True, "o": True, "mlp": True}


def config(draw, spec, biases: dict):
    wide = spec.intermediate == 4 * spec.hidden
    found = {
        "architectures": [ARCHITECTURE],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.hidden,
        "n_inner": None if wide else spec.intermediate,
        "n_layer": spec.n_layers,
        "n_head": spec.n_heads,
        "n_positions": spec.max_positions,
        "activation_function": draw.one(ACTIVATION_NAMES[spec.activation]),
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "scale_attn_weights": not spec.attention_scale,
        "scale_attn_by_inverse_layer_idx": False,
    }
    return without(draw, found, _ABSENT), spec.rope


def tensors(draw, spec, weights) -> dict:
    prefix = draw.one(("transformer.", ""))
    found = {f"{prefix}wte.weight": weights.table()}
    if not spec.tied or draw.maybe(0.2):
        found["lm_head.weight"] = weights.head()
    for (_, layer, _), bundle in weights.bundles.items():
        base = prefix if layer == spec.n_layers else f"{prefix}h.{layer}."
        for name, value in gpt_neox.in_turn(bundle).items():
            stem, parameter = stem_and_kind(name)
            if name == "positions":
                found[f"{prefix}wpe.weight"] = value
            else:
                found[f"{base}{_NAMES[stem]}.{parameter}"] = value.T if value.ndim > 1 else value
    if draw.maybe(0.3):  # a buffer that the first checkpoints carry
        found[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 4, 4))
    return found


def gguf_facts(seed: int) -> dict:
    return {"activation": "gelu_tanh", "attention_scale": 0.0}


def gguf_keys(writer, spec) -> None:
    writer.add_layer_norm_eps(spec.norm_eps)


gguf_tensors = gpt_neox.gguf_tensors
