"""DeepSeek-V2 and V3, and what is built like them. Older files have one tensor for what keys and
values make of latents, and sizes of heads; newer ones have two, and sizes of what is kept."""

MODEL_TYPE = "deepseek_v2"
READS = (
    ".rope.dimension_count", ".attention.value_length", ".expert_gating_func",
    ".expert_weights_scale", ".expert_group_count", ".rope.scaling.yarn_log_multiplier",
)  # fmt: skip
NAMES = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj", "attn_v_b": "self_attn.v_b_proj",
    "exp_probs_b": "mlp.gate.e_score_correction",
}  # fmt: skip

_SOFTMAX, _SIGMOID = 1, 2
_LOG_SCALE = 0.1
"""What the converter multiplies mscale_all_dim by."""


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: DeepseekV2Model in convert_hf_to_gguf.py. No file says how YaRN's mscale differs from
    mscale_all_dim: in no model it does."""
    rotated, layers = metadata.count(".rope.dimension_count"), config["num_hidden_layers"]
    key, value = (_size(metadata, name) for name in ("key_length", "value_length"))
    if not 2 <= rotated < key:
        raise metadata.error(".rope.dimension_count", f"does not fit keys of {key} numbers")
    experts = metadata.count(".expert_count", 0)
    found = {
        "rope_scaling": _rope(metadata, config),
        "num_hidden_layers": max(0, layers - metadata.count(".nextn_predict_layers", 0)),
        "kv_lora_rank": metadata.count(".attention.kv_lora_rank"),
        "q_lora_rank": metadata.count(".attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rotated, "qk_nope_head_dim": key - rotated, "v_head_dim": value,
        "first_k_dense_replace": metadata.count(".leading_dense_block_count", 0),
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in tensors,
    }  # fmt: skip
    if not experts:
        return found | {"first_k_dense_replace": layers}
    return found | _experts(metadata, experts)


def _size(metadata, name: str) -> int:
    """Of a head, whichever a file says."""
    newer = f".attention.{name}_mla"
    return metadata.count(newer if newer in metadata else f".attention.{name}")


def _rope(metadata, config: dict) -> dict | None:
    scaling = config["rope_scaling"]
    if not scaling or scaling["rope_type"] != "yarn":
        return scaling
    said = metadata.number(".rope.scaling.yarn_log_multiplier", 0.0)
    if not said:
        return scaling
    if metadata.number(".rope.scaling.attn_factor", 1.0) != 1.0:
        raise metadata.unsupported(".rope.scaling.attn_factor", "1 with yarn_log_multiplier")
    # A decimal that the converter's product rounds from.
    both = float(f"{said / _LOG_SCALE:.6g}")
    del scaling["attention_factor"]
    return scaling | {"mscale": both, "mscale_all_dim": both}


def _experts(metadata, experts: int) -> dict:
    gating = metadata.count(".expert_gating_func", _SOFTMAX) or _SOFTMAX
    if gating not in (_SOFTMAX, _SIGMOID):
        raise metadata.unsupported(".expert_gating_func", "1 (softmax), 2 (sigmoid)")
    groups = metadata.count(".expert_group_count", 1) or 1
    softmax = {"topk_method": "group_limited_greedy" if groups > 1 else "greedy"}
    return (softmax if gating == _SOFTMAX else {"model_type": "deepseek_v3"}) | {
        "n_routed_experts": experts,
        "num_experts_per_tok": metadata.count(".expert_used_count"),
        "moe_intermediate_size": metadata.count(".expert_feed_forward_length"),
        "n_shared_experts": metadata.count(".expert_shared_count", 0),
        "norm_topk_prob": metadata.flag(".expert_weights_norm", False),
        "routed_scaling_factor": metadata.number(".expert_weights_scale", 1.0) or 1.0,
        "n_group": groups,
        "topk_group": metadata.count(".expert_group_used_count", 1) or 1,
    }
