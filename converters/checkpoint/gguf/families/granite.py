"""Granite: Llama's tensors, and keys for its multipliers."""

MODEL_TYPE = "granite"
READS = (".attention.scale", ".embedding_scale", ".residual_scale", ".logit_scale")
INTERLEAVED = True


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: GraniteModel in convert_hf_to_gguf.py; what switches rope off is as llama.cpp has it
    in llama-model.cpp."""
    if not metadata.flag(".rope.scaling.finetuned", True):
        raise metadata.unsupported(".rope.scaling.finetuned", "true")
    return {
        "attention_multiplier": metadata.number(".attention.scale"),
        "embedding_multiplier": metadata.number(".embedding_scale", 1.0),
        "residual_multiplier": metadata.number(".residual_scale", 1.0),
        "logits_scaling": metadata.number(".logit_scale", 1.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
