"""GGUF metadata → the config.json that the original checkpoint must have had.

Keys are those of gguf-py's constants.py; what an architecture fixes without saying so (whether
router weights are normalised, which activation, what an absent key means) is as llama.cpp has it in
llama-model.cpp. What would need arithmetic that no supported model type has is refused by name.
"""

from __future__ import annotations

from .families import OWN
from .metadata import Metadata
from .rope import longrope, rope_scaling
from .tensors import GgufTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmoe", "qwen2moe", "qwen3moe", *OWN)
_MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
_NORMALIZED = {"mixtral": True, "olmoe": False, "qwen2_moe": False, "qwen3_moe": True}
"""Whether the weights of the chosen experts are made to add up to 1."""

_NEUTRAL = {
    ".attention.scale": (0.0,),
    ".attention.max_alibi_bias": (0.0,),
    ".attention.temperature_scale": (0.0,),
    ".attn_logit_softcapping": (0.0,),
    ".router_logit_softcapping": (0.0,),
    ".final_logit_softcapping": (0.0,),
    ".logit_scale": (0.0, 1.0),
    ".residual_scale": (0.0, 1.0),
    ".embedding_scale": (0.0, 1.0),
    ".expert_weights_scale": (0.0, 1.0),
    ".expert_group_count": (0.0, 1.0),
    ".expert_gating_func": (0.0, 1.0),
    ".rope.scaling.yarn_log_multiplier": (0.0,),
    ".rope.scaling.yarn_attn_factor": (1.0,),
    ".rope.scaling.yarn_ext_factor": (1.0,),
}
"""Keys that change the forward pass, with the values that do not."""

_MAX_LAYERS = 1 << 16


def config_of(metadata: Metadata, tensors: dict[str, GgufTensor]) -> dict:
    """The config, from the metadata and from which tensors (by GGUF names) there are.

    Raises CheckpointError for a missing or bad key, UnsupportedError for an unknown architecture.
    """
    if metadata.architecture not in ARCHITECTURES:
        raise metadata.unsupported("general.architecture", ", ".join(ARCHITECTURES))
    _check_neutral(metadata)
    own = OWN.get(metadata.architecture)
    model_type = _model_type(metadata)
    layers, heads = metadata.count(".block_count"), metadata.count(".attention.head_count")
    hidden = metadata.count(".embedding_length")
    if not 1 <= layers <= _MAX_LAYERS or not 1 <= heads <= hidden:
        raise metadata.error(".block_count", f"with {heads} heads of {hidden} is out of range")
    head_dim = metadata.count(".attention.key_length", hidden // heads)
    _check_heads(metadata, head_dim)
    config = {
        "model_type": model_type,
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.count(".feed_forward_length", 0),
        "max_position_embeddings": metadata.count(".context_length"),
        "rms_norm_eps": metadata.number(getattr(own, "EPS", ".attention.layer_norm_rms_epsilon")),
        "vocab_size": _vocab_size(metadata, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": metadata.number(".rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(metadata, tensors, head_dim),
        **longrope(metadata, tensors),
    }
    return config | (own.config if own else _of_type)(metadata, tensors, config)


def _check_neutral(metadata: Metadata) -> None:
    reads = getattr(OWN.get(metadata.architecture), "READS", ())
    for key, neutral in _NEUTRAL.items():
        if key in metadata and key not in reads and metadata.number(key) not in neutral:
            raise metadata.unsupported(key, " or ".join(f"{value:g}" for value in neutral))
    if not metadata.flag(".attention.causal", True):
        raise metadata.unsupported(".attention.causal", "true")


def _check_heads(metadata: Metadata, head_dim: int) -> None:
    reads = getattr(OWN.get(metadata.architecture), "READS", ())
    for key in (".attention.value_length", ".rope.dimension_count"):
        if key not in reads and metadata.count(key, head_dim) != head_dim:
            raise metadata.unsupported(key, f"the size of a head, {head_dim}")


def _model_type(metadata: Metadata) -> str:
    """Llama, Mistral and Mixtral are one architecture to llama.cpp."""
    name = metadata.architecture
    if name in OWN:
        return OWN[name].MODEL_TYPE
    if name != "llama":
        return _MODEL_TYPES.get(name, name)
    if metadata.count(".expert_count", 0):
        return "mixtral"
    return "mistral" if metadata.count(".attention.sliding_window", 0) else "llama"


def _vocab_size(metadata: Metadata, tensors: dict[str, GgufTensor]) -> int:
    """The rows of the embedding, which may be more than the tokens that have a text."""
    table = tensors.get("token_embd.weight")
    return table.shape[0] if table else metadata.count(".vocab_size")


def _of_type(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict) -> dict:
    """What only some model types have: experts, biases, windows, clipping."""
    model_type, found = config["model_type"], {}
    if model_type in _NORMALIZED:
        found = _experts(metadata, tensors, config)
    if model_type == "olmoe":
        found["clip_qkv"] = metadata.number(".attention.clamp_kqv", 0.0) or None
    elif metadata.number(".attention.clamp_kqv", 0.0):
        raise metadata.unsupported(".attention.clamp_kqv", "0")
    if model_type in ("mistral", "mixtral"):
        found["sliding_window"] = metadata.count(".attention.sliding_window", 0) or None
    biased = "blk.0.attn_q.bias" in tensors
    found |= {"attention_bias": biased, "qkv_bias": biased}
    found["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    return found


def _experts(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict) -> dict:
    model_type, width = config["model_type"], config["intermediate_size"]
    top_k = metadata.count(".expert_used_count")
    expert_width = metadata.count(".expert_feed_forward_length", None)
    found = {
        "num_experts": metadata.count(".expert_count"),
        "num_experts_per_tok": top_k,
        "norm_topk_prob": metadata.flag(".expert_weights_norm", _NORMALIZED[model_type]),
    }
    if model_type in ("mixtral", "olmoe"):
        found["intermediate_size"] = width if expert_width is None else expert_width
        return found
    found["moe_intermediate_size"] = (
        width // max(1, top_k) if expert_width is None else expert_width
    )
    if model_type == "qwen2_moe":
        shared = metadata.count(".expert_shared_feed_forward_length", width)
        found["shared_expert_intermediate_size"] = shared
    found["mlp_only_layers"] = [
        layer
        for layer in range(config["num_hidden_layers"])
        if f"blk.{layer}.ffn_gate_inp.weight" not in tensors
        and f"blk.{layer}.ffn_gate.weight" in tensors
    ]
    return found
