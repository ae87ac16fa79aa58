"""Phi-3.5-MoE. No file says what longrope multiplies cosines and sines by."""

from edgemem.errors import UnsupportedError

from ..naming import LONG_FACTORS

MODEL_TYPE = "phimoe"
TABLES = {"output.bias": "lm_head.bias", "output_norm.bias": "model.norm.bias"}


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: PhiMoeModel in convert_hf_to_gguf.py."""
    if LONG_FACTORS in tensors:
        raise UnsupportedError(
            f"reading {metadata.path}: {LONG_FACTORS} is not supported for phimoe: the file lacks "
            "its short_mscale and long_mscale; convert from the original checkpoint"
        )
    width = config["intermediate_size"]
    return {
        "sliding_window": metadata.count(".attention.sliding_window", 0) or None,
        "intermediate_size": metadata.count(".expert_feed_forward_length", width),
        "num_local_experts": metadata.count(".expert_count"),
        "num_experts_per_tok": metadata.count(".expert_used_count"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "lm_head_bias": "output.bias" in tensors,
    }
