"""Model types that are drawn and spelled each in a module of its own, as converters/families has
them. Such a module says

    ARCHITECTURE                  the name of the class in a config
    spec(draw, vocab_size)        a random spec that the type can express
    biases(draw)                  which projections have a bias: of "qkv", "o", "mlp", "head"; and
                                  the deviation of those of the "router" and the "experts"
    config(draw, spec, biases)    one config.json, but for token ids, and the spec's rope as spelled
    hold(spec, weights)           makes the weights those that their format holds, where that is
                                  not the checkpoint's one
    tensors(draw, spec, weights)  the weights by the names that hub checkpoints of the type use
    GGUF                          llama.cpp's name of the architecture
    gguf_facts(seed)              facts that keep a spec to what GGUF can say
    gguf_keys(writer, spec)       the metadata beside that of all models (tiny_gguf)
    gguf_tensors(spec, weights)   the weights by GGUF names
"""

from types import ModuleType

from . import deepseek_v2, deepseek_v3, gemma2, gemma3_text, glm4_moe, gpt2, gpt_neox, gpt_oss
from . import granite, granitemoe, phi3, phimoe

FAMILIES: dict[str, ModuleType] = {
    "granite": granite, "granitemoe": granitemoe, "phi3": phi3, "gemma2": gemma2,
    "gemma3_text": gemma3_text, "gpt_neox": gpt_neox, "gpt2": gpt2, "glm4_moe": glm4_moe,
    "phimoe": phimoe, "gpt_oss": gpt_oss, "deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3,
}  # fmt: skip
