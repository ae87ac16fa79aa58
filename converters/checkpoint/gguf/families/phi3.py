"""Phi-3: fused matrices."""

from ..rope import share_of

MODEL_TYPE = "phi3"
READS = (".rope.dimension_count",)
NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: Phi3MiniModel in convert_hf_to_gguf.py."""
    return {
        "sliding_window": metadata.count(".attention.sliding_window", 0) or None,
        "partial_rotary_factor": share_of(metadata, config["head_dim"]),
    }
