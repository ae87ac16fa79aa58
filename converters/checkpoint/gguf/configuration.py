"""GGUF metadata → the config.json that the original checkpoint must have had.

Keys are those of gguf-py's constants.py; what an architecture fixes without saying so (whether
router weights are normalised, which activation, what an absent key means) is as llama.cpp has it in
llama-model.cpp. What would need arithmetic that no supported model type has is refused by name.
"""

from __future__ import annotations

import math

import numpy as np

from edgemem.errors import CheckpointError, UnsupportedError

from .families import OWN
from .metadata import Metadata
from .naming import ROPE_FACTORS
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
}
"""Keys that change the forward pass, with the values that do not."""

_MAX_LAYERS = 1 << 16
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants of every Llama from 3.1 on; only the factor differs."""
_FACTOR_TOLERANCE = 4e-6
"""Relative: the converter computes factors in 32-bit floats, and stores them as such."""


def config_of(metadata: Metadata, tensors: dict[str, GgufTensor]) -> dict:
    """The config, from the metadata and from which tensors (by GGUF names) there are.

    Raises CheckpointError for a missing or bad key, UnsupportedError for an unknown architecture.
    """
    if metadata.architecture not in ARCHITECTURES:
        raise metadata.unsupported("general.architecture", ", ".join(ARCHITECTURES))
    _check_neutral(metadata)
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
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocab_size(metadata, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": metadata.number(".rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, tensors, head_dim),
    }
    own = OWN.get(metadata.architecture)
    return config | (own.config if own else _of_type)(metadata, tensors, config)


def _check_neutral(metadata: Metadata) -> None:
    reads = getattr(OWN.get(metadata.architecture), "READS", ())
    for key, neutral in _NEUTRAL.items():
        if key in metadata and key not in reads and metadata.number(key) not in neutral:
            raise metadata.unsupported(key, " or ".join(f"{value:g}" for value in neutral))
    if not metadata.flag(".attention.causal", True):
        raise metadata.unsupported(".attention.causal", "true")


def _check_heads(metadata: Metadata, head_dim: int) -> None:
    for key in (".attention.value_length", ".rope.dimension_count"):
        if metadata.count(key, head_dim) != head_dim:
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


def _rope_scaling(metadata: Metadata, tensors: dict[str, GgufTensor], head_dim: int) -> dict | None:
    if ROPE_FACTORS in tensors:
        return _llama3(metadata, tensors[ROPE_FACTORS], head_dim)
    linear = metadata.number(".rope.scale_linear", 0.0)  # the key of the first files
    kind = metadata.text(".rope.scaling.type", "linear" if linear else "none")
    factor = metadata.number(".rope.scaling.factor", linear)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise metadata.unsupported(".rope.scaling.type", "none, linear, yarn")
    original = metadata.count(".rope.scaling.original_context_length", None)
    attention = metadata.number(".rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or metadata.count(".context_length"),
        "attention_factor": attention * (1.0 + 0.1 * math.log(max(factor, 1.0))),
        "beta_fast": metadata.number(".rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(".rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(metadata: Metadata, tensor: GgufTensor, head_dim: int) -> dict | None:
    """The constants of Llama 3's scaling that give these factors, every one of them.

    The file holds what each frequency is divided by (`generate_extra_tensors` of LlamaModel in
    convert_hf_to_gguf.py); the constants are found again and proved by computing the factors from
    them, so that the model's frequencies are those of the original config, not of rounded factors.
    """
    if tensor.shape != (head_dim // 2,) or tensor.type_name != "F32" or head_dim < 2:
        raise CheckpointError(
            f"reading {metadata.path}: {ROPE_FACTORS} is {tensor.type_name} of the shape "
            f"{list(tensor.shape)}, not F32 with half a head, {head_dim // 2}"
        )
    factors = tensor.read_rows(0, 1)[0].view(np.float32).astype(np.float64)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise CheckpointError(f"reading {metadata.path}: {ROPE_FACTORS} holds bad numbers")
    if (factors == 1).all():
        return None
    theta = metadata.number(".rope.freq_base", 10000.0)
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    for constants in (_LLAMA3, _fitted(frequencies, factors)):
        scaling = constants and _proved(constants, frequencies, factors)
        if scaling:
            return {"rope_type": "llama3"} | scaling
    raise UnsupportedError(
        f"reading {metadata.path}: {ROPE_FACTORS} does not follow Llama 3's rule, whatever its "
        "constants; no other rule is supported"
    )


def _fitted(frequencies: np.ndarray, factors: np.ndarray) -> dict:
    """Constants from the ramp, on which 1 / factor is linear in the frequency; {} without one.

    Only the ratios of the three constants matter, so the lower one may be taken as 1.
    """
    top = factors.max()
    ramp = (factors > 1) & (factors < top)
    if ramp.sum() < 2:
        return {}
    smooth = (1 / factors[ramp] - 1 / top) / (1 - 1 / top)
    slope, offset = np.polyfit(frequencies[ramp], smooth, 1)
    if not (slope > 0 and offset < 0):
        return {}
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": float(f"{1 - 1 / offset:.5g}"),
        "original_max_position_embeddings": round(-2 * math.pi * slope / offset),
    }


def _proved(constants: dict, frequencies: np.ndarray, factors: np.ndarray) -> dict | None:
    """The constants with their factor, if all factors follow from them; else None.

    The rule is that of `edgemem/models/rope.py`: a share of a frequency is kept, the rest slowed.
    """
    low, high = constants["low_freq_factor"], constants["high_freq_factor"]
    turns = constants["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    slowest = keep.argmin()
    rest = 1 / factors[slowest] - keep[slowest]
    factor = float(f"{(1 - keep[slowest]) / rest:.5g}") if rest > 0 else 0.0
    if not 0 < factor < 1e9:
        return None
    expected = 1 / (keep + (1 - keep) / factor)
    proved = np.allclose(factors, expected, rtol=_FACTOR_TOLERANCE, atol=0)
    return constants | {"factor": factor} if proved else None
