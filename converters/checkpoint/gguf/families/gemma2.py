"""Gemma 2: norms that have 1 added already."""

MODEL_TYPE = "gemma2"
READS = (".attn_logit_softcapping", ".final_logit_softcapping")
NAMES = {
    "attn_norm": "input_layernorm.plus_one",
    "post_attention_norm": "post_attention_layernorm.plus_one",
    "ffn_norm": "pre_feedforward_layernorm.plus_one",
    "post_ffw_norm": "post_feedforward_layernorm.plus_one",
    "attn_q_norm": "self_attn.q_norm.plus_one",
    "attn_k_norm": "self_attn.k_norm.plus_one",
}
TABLES = {"output_norm.weight": "model.norm.plus_one.weight"}

_LAYERS_OF_27B = 46


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: Gemma2Model in convert_hf_to_gguf.py, and llama.cpp for what it leaves out."""
    return common_config(tensors, config, _LAYERS_OF_27B) | {
        "sliding_window": metadata.count(".attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata.number(".attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": metadata.number(".final_logit_softcapping", 30.0) or None,
    }


def common_config(tensors: dict, config: dict, layers_of_27b: int) -> dict:
    """The model of 27 B parameters alone scales scores by another number than that of a head, and
    no file says so: llama.cpp knows it by its layers."""
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == layers_of_27b:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }  # fmt: skip
