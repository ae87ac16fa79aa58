"""GraniteMoE: Granite with experts in every layer."""

from . import granite

MODEL_TYPE = "granitemoe"
READS, INTERLEAVED = granite.READS, granite.INTERLEAVED


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: GraniteMoeModel in convert_hf_to_gguf.py. Files of its variant with a shared expert
    have the same architecture."""
    if metadata.count(".expert_shared_feed_forward_length", 0):
        raise metadata.unsupported(".expert_shared_feed_forward_length", "0")
    width = metadata.count(".expert_feed_forward_length", config["intermediate_size"])
    return granite.config(metadata, tensors, config) | {
        "intermediate_size": width, "num_local_experts": metadata.count(".expert_count"),
        "num_experts_per_tok": metadata.count(".expert_used_count"),
    }  # fmt: skip
