"""gpt-oss: sinks, biases everywhere, experts of clamped gates; where rows are whole blocks of 32,
experts are in MXFP4."""

from dataclasses import replace

import gguf
import numpy as np
from tiny_config import spell_rope

from edgemem.spec import RopeSpec

from .drawing import LLAMA_NAMES, config as llama_config
from .drawing import GGUF_NAMES, gated, gguf_layers, stem_and_kind, tables, with_rope

ARCHITECTURE = "GptOssForCausalLM"
GGUF = "gpt-oss"
DEFAULT_ROPE = RopeSpec(
    "yarn", 150000.0, 32.0, 4096, attention_factor=1 + 0.1 * float(np.log(32)), truncate=False
)
_ABSENT = {
    "tie_word_embeddings": False, "attention_bias": True, "sliding_window": 128,
    "num_experts_per_tok": 4, "head_dim": 64, "hidden_act": "silu",
}  # fmt: skip
_MXFP4 = gguf.GGMLQuantizationType.MXFP4


def spec(draw, vocab_size: int):
    width, window = draw.whole(8, 30), draw.one((1, 3, 8, 16, 128))
    rule, n_experts = draw.maybe(0.6), draw.one((2, 4, 7, 12))
    plain = gated(
        draw, "gpt_oss", vocab_size, activation="clamped_swiglu", sinks=True, intermediate=width,
        expert_intermediate=width, n_experts=n_experts, top_k=draw.whole(1, min(n_experts, 4)),
        normalize_top_k=True,
    )  # fmt: skip
    if draw.maybe(0.5):
        plain = replace(plain, hidden=draw.whole(24, 60))
    layers = range(plain.n_layers)
    sliding = [i % 2 == 0 if rule else draw.maybe(0.5) for i in layers]
    plain = replace(
        plain, routed=(True,) * plain.n_layers, windows=tuple(window * s for s in sliding)
    )
    return replace(plain, rope=DEFAULT_ROPE) if draw.maybe(0.2) else with_rope(draw, plain)


def biases(draw) -> dict:
    """Those of experts are large enough for some gates to be clamped, mostly."""
    some = draw.maybe(0.7)
    return {
        "qkv": some, "o": some, "mlp": False, "router": 0.5, "experts": draw.one((0.2, 4.0, 4.0)),
    }  # fmt: skip


def config(draw, spec, biases: dict):
    kinds, rule = {False: "full_attention", True: "sliding_attention"}, draw.maybe(0.7)
    sliding = [bool(window) for window in spec.windows]
    rope, spelled = {}, spec.rope  # which nothing said means
    if spec.rope != DEFAULT_ROPE:
        rope, spelled = spell_rope(draw, spec)
        if rope.get("rope_scaling", 0) is None:  # which would mean the default
            rope["rope_scaling"] = {"rope_type": "default"}
    more = rope | {
        "attention_bias": biases["qkv"], "head_dim": spec.head_dim,
        "num_local_experts": spec.n_experts, "num_experts_per_tok": spec.top_k,
        "sliding_window": max(spec.windows) or 128,
    }  # fmt: skip
    if not (rule and sliding == [i % 2 == 0 for i in range(spec.n_layers)]):
        more["layer_types"] = [kinds[slides] for slides in sliding]
    if draw.maybe(0.5):
        more |= {"swiglu_limit": 7.0}
    if in_blocks(spec):
        more["quantization_config"] = {"quant_method": "mxfp4", "dequantize": True}
    plain = replace(spec, activation="silu")  # what configs say, and nobody reads
    found = llama_config(draw, plain, ARCHITECTURE, _ABSENT, more)
    if not rope:
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            found.pop(name, None)
    return found, spelled


def in_blocks(spec) -> bool:
    """Whether a spec's experts are in MXFP4."""
    return spec.hidden % 32 == 0 and spec.expert_intermediate % 32 == 0


def hold(spec, weights) -> None:
    """Make the weights those that their format holds."""
    for (kind, _, _), bundle in weights.bundles.items():
        for name in ("gate", "up", "down") if kind == "expert" and in_blocks(spec) else ():
            bundle[name] = gguf.quants.dequantize(quantized(bundle[name]), _MXFP4)


def quantized(values: np.ndarray) -> np.ndarray:
    """uint8 [..., bytes]: GGML's blocks of a scale and 16 bytes."""
    return gguf.quants.quantize(np.ascontiguousarray(values, np.float32), _MXFP4)


def tensors(draw, spec, weights) -> dict:
    found, experts = tables(draw, spec, weights), {}
    names = LLAMA_NAMES | {"router": "mlp.router", "router_logit": "mlp.router"}
    for (kind, layer, _), bundle in weights.bundles.items():
        base = f"model.layers.{layer}."
        for name, value in bundle.items():
            stem, parameter = stem_and_kind(name)
            if layer == spec.n_layers:
                found["model.norm.weight"] = value
            elif kind == "expert":
                experts.setdefault((layer, name), []).append(value)
            elif name == "sinks":
                found[f"{base}self_attn.sinks"] = value
            else:
                found[f"{base}{names[stem]}.{parameter}"] = value
    for layer in range(spec.n_layers):
        parts = {n: np.stack(each) for (at, n), each in experts.items() if at == layer}
        for end in ("", "_bias"):
            base, both = f"model.layers.{layer}.mlp.experts.", (f"gate{end}", f"up{end}")
            gate_up = np.stack([parts[name] for name in both], axis=2)  # rows take turns
            gate_up = gate_up.reshape(spec.n_experts, -1, *gate_up.shape[3:])
            for name, value in (("gate_up_proj", gate_up), ("down_proj", parts[f"down{end}"])):
                found |= _stored(spec, base + name + end, value)
    return found


def _stored(spec, name: str, value: np.ndarray) -> dict:
    if value.ndim == 2:
        return {name: value}
    if not in_blocks(spec):
        return {name: value.swapaxes(1, 2)}
    blocks = quantized(value).reshape(*value.shape[:2], -1, 17)
    numbers = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
    halves = numbers[..., ::2] | numbers[..., 1::2] << 4
    return {f"{name}_blocks": halves, f"{name}_scales": np.ascontiguousarray(blocks[..., 0])}


def gguf_facts(seed: int) -> dict:
    ropes = (DEFAULT_ROPE, RopeSpec(theta=10000.0), RopeSpec("linear", 10000.0, 4.0))
    window = (5, 16)[seed % 2]
    return {
        "n_layers": 3, "windows": (window, 0, window), "routed": (True,) * 3,
        "max_positions": 512, "rope": ropes[seed % 3],
    }  # fmt: skip


MXFP4 = gguf_facts(0) | {
    "hidden": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "intermediate": 32,
    "expert_intermediate": 32, "n_experts": 6, "top_k": 2,
}  # fmt: skip
"""Facts of a model whose experts are in MXFP4."""


def gguf_keys(writer, spec) -> None:
    """Those of all models are enough."""


def gguf_tensors(spec, weights) -> dict:
    names = GGUF_NAMES | {
        "ffn_norm": "post_attention_norm", "router_logit": "ffn_gate_inp", "sinks": "attn_sinks",
    }  # fmt: skip
    return gguf_layers(spec, weights, names)
