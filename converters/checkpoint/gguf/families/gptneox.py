"""GPT-NeoX: q, k and v in one matrix, one after another."""

from ..rope import share_of

MODEL_TYPE = "gpt_neox"
READS = (".rope.dimension_count",)
EPS = ".attention.layer_norm_epsilon"
LAYERS = "gpt_neox.layers."
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_qkv": "attention.query_key_value.apart", "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
TABLES = {
    "token_embd.weight": "gpt_neox.embed_in.weight",
    "output_norm.weight": "gpt_neox.final_layer_norm.weight",
    "output_norm.bias": "gpt_neox.final_layer_norm.bias",
}


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: GPTNeoXModel in convert_hf_to_gguf.py. The activation is that of the checkpoints."""
    return {
        "hidden_act": "gelu", "layer_norm_eps": config["rms_norm_eps"],
        "rotary_pct": share_of(metadata, config["head_dim"]) or 1.0,
        "rotary_emb_base": config["rope_theta"],
        "use_parallel_residual": metadata.flag(".use_parallel_residual", True),
        "attention_bias": "blk.0.attn_qkv.bias" in tensors,
    }  # fmt: skip
