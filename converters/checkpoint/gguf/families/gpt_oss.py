"""gpt-oss: the norm before the experts is called that after attention."""

MODEL_TYPE = "gpt_oss"
NAMES = {
    "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router", "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj", "ffn_down_exps": "mlp.experts.down_proj",
}  # fmt: skip


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: GptOssModel in convert_hf_to_gguf.py. Every other layer slides, from the first on.
    That YaRN's bounds are no whole numbers is said in the original config alone."""
    pattern, rope = ".attention.sliding_window_pattern", config["rope_scaling"]
    if pattern in metadata and metadata.count(pattern) != 2:
        raise metadata.unsupported(pattern, "2")
    if rope is None:
        rope = {"rope_type": "default"}
    return {
        "sliding_window": metadata.count(".attention.sliding_window"),
        "rope_scaling": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
        "intermediate_size": metadata.count(".expert_feed_forward_length"),
        "num_local_experts": metadata.count(".expert_count"),
        "num_experts_per_tok": metadata.count(".expert_used_count"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
