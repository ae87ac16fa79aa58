"""GraniteMoE: Granite with experts in every layer, whose matrices lie together."""

from . import granite
from .drawing import fused_experts

ARCHITECTURE = "GraniteMoeForCausalLM"
GGUF = "granitemoe"


def spec(draw, vocab_size: int):
    n_layers, n_experts, width = draw.whole(1, 2), draw.one((2, 3, 5, 8)), draw.whole(8, 40)
    return granite.spec(
        draw, vocab_size, "granitemoe", n_layers=n_layers, windows=(0,) * n_layers,
        routed=(True,) * n_layers, n_experts=n_experts, top_k=draw.whole(1, min(n_experts, 4)),
        expert_intermediate=width, intermediate=width, normalize_top_k=True,
    )  # fmt: skip


def biases(draw) -> dict:
    return granite.biases(draw) | {"mlp": False}


def config(draw, spec, biases: dict):
    more = {"num_local_experts": spec.n_experts, "num_experts_per_tok": spec.top_k}
    return granite.config(draw, spec, biases, ARCHITECTURE, **more)


def tensors(draw, spec, weights) -> dict:
    found, old = granite.tensors(draw, spec, weights), draw.maybe(0.6)
    names = ("input_linear.weight", "output_linear.weight", "router.layer.weight")
    if not old:  # as transformers 5 holds them
        names = ("experts.gate_up_proj", "experts.down_proj", "router.weight")
    for layer in range(spec.n_layers):
        parts = (*fused_experts(weights, layer, spec.n_experts), weights.dense(layer)["router"])
        for name, part in zip(names, parts, strict=True):
            found[f"model.layers.{layer}.block_sparse_moe.{name}"] = part
    return found


gguf_facts, gguf_keys, gguf_tensors = granite.gguf_facts, granite.gguf_keys, granite.gguf_tensors
