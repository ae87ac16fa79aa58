"""GLM-4.5: the norm before the FFN is called that after attention."""

from ..rope import share_of

MODEL_TYPE = "glm4_moe"
READS = (
    ".rope.dimension_count", ".expert_gating_func", ".expert_weights_scale", ".expert_group_count",
)  # fmt: skip
NAMES = {
    "post_attention_norm": "post_attention_layernorm", "exp_probs_b": "mlp.gate.e_score_correction",
}  # fmt: skip

_SIGMOID = 2


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: Glm4MoeModel in convert_hf_to_gguf.py."""
    if metadata.count(".expert_gating_func", _SIGMOID) != _SIGMOID:
        raise metadata.unsupported(".expert_gating_func", f"{_SIGMOID} (sigmoid)")
    behind = metadata.count(".nextn_predict_layers", 0)
    return {
        "num_hidden_layers": max(0, config["num_hidden_layers"] - behind),
        "partial_rotary_factor": share_of(metadata, config["head_dim"]) or 1.0,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "n_routed_experts": metadata.count(".expert_count"),
        "num_experts_per_tok": metadata.count(".expert_used_count"),
        "moe_intermediate_size": metadata.count(".expert_feed_forward_length"),
        "n_shared_experts": metadata.count(".expert_shared_count", 1),
        "first_k_dense_replace": metadata.count(".leading_dense_block_count", 0),
        "norm_topk_prob": metadata.flag(".expert_weights_norm", True),
        "routed_scaling_factor": metadata.number(".expert_weights_scale", 1.0) or 1.0,
        "n_group": metadata.count(".expert_group_count", 1) or 1,
        "topk_group": metadata.count(".expert_group_used_count", 1) or 1,
    }
