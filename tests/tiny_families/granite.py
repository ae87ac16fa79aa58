"""Granite: Llama with four multipliers."""

from tiny_config import spell_rope

from .drawing import LLAMA_NAMES, config as llama_config
from .drawing import gated, gguf_layers, gguf_rope, stem_and_kind, tables, with_rope

ARCHITECTURE = "GraniteForCausalLM"
GGUF = "granite"
_ABSENT = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    "attention_multiplier": 1.0,
}  # fmt: skip


def spec(draw, vocab_size: int, model_type: str = "granite", **facts):
    plain = gated(draw, model_type, vocab_size, **scales(draw), **facts)
    return with_rope(draw, plain)


def scales(draw) -> dict:
    return {
        "embedding_scale": draw.one((1.0, 12.0, draw.real(0.5, 3.0))),
        "residual_scale": draw.one((1.0, 0.22, draw.real(0.2, 1.5))),
        "logit_scale": 1.0 / draw.one((1.0, 8.0, draw.real(0.3, 4.0))),
        "attention_scale": draw.one((1.0, 0.25, draw.real(0.05, 0.7))),
    }


def biases(draw) -> dict:
    some = draw.maybe(0.5)
    return {"qkv": some, "o": some, "mlp": draw.maybe(0.5)}


def config(draw, spec, biases: dict, architecture: str = ARCHITECTURE, **more):
    rope, spelled = spell_rope(draw, spec)
    multipliers = {
        "embedding_multiplier": spec.embedding_scale, "residual_multiplier": spec.residual_scale,
        "logits_scaling": round(1 / spec.logit_scale, 6),
        "attention_multiplier": spec.attention_scale, "attention_bias": biases["qkv"],
    }  # fmt: skip
    if spec.model_type == "granite":
        multipliers["mlp_bias"] = biases["mlp"]
    more = multipliers | rope | more
    return llama_config(draw, spec, architecture, _ABSENT, more), spelled


def tensors(draw, spec, weights) -> dict:
    found = tables(draw, spec, weights)
    for (kind, layer, _), bundle in weights.bundles.items():
        for name, value in bundle.items():
            stem, parameter = stem_and_kind(name)
            if layer == spec.n_layers:
                found["model.norm.weight"] = value
            elif kind != "expert" and stem != "router":
                found[f"model.layers.{layer}.{LLAMA_NAMES[stem]}.{parameter}"] = value
    return found


def gguf_facts(seed: int) -> dict:
    scales = {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 1 / 8}
    return {"activation": "silu", "max_positions": 512, "rope": gguf_rope(seed)} | scales


def gguf_keys(writer, spec) -> None:
    writer.add_attention_scale(spec.attention_scale)
    writer.add_embedding_scale(spec.embedding_scale)
    writer.add_residual_scale(spec.residual_scale)
    writer.add_logit_scale(round(1 / spec.logit_scale, 6))


gguf_tensors = gguf_layers
