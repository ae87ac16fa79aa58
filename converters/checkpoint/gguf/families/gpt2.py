"""GPT-2: matrices as other models have them, not turned around as in its checkpoints."""

MODEL_TYPE = "gpt2"
READS = (".rope.dimension_count",)
EPS = ".attention.layer_norm_epsilon"
LAYERS = "transformer.h."
NAMES = {
    "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn.turned",
    "attn_output": "attn.c_proj.turned", "ffn_up": "mlp.c_fc.turned",
    "ffn_down": "mlp.c_proj.turned",
}  # fmt: skip
TABLES = {
    "token_embd.weight": "transformer.wte.weight", "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight", "output_norm.bias": "transformer.ln_f.bias",
}  # fmt: skip


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: GPT2Model in convert_hf_to_gguf.py."""
    return {
        "n_embd": config["hidden_size"], "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"], "n_inner": config["intermediate_size"],
        "n_positions": config["max_position_embeddings"], "activation_function": "gelu_new",
        "layer_norm_epsilon": config["rms_norm_eps"],
    }  # fmt: skip
