"""Model types whose checkpoints are spelled unlike Llama's, each in a module of its own.

Such a module says
    DEFAULTS            what an absent key of the config means
    KEYS                which key says what others call by another name
    EMBED, HEAD         the name of the embedding, and those that the output table may have
    PREFIXES            what may stand before all names but those of the output table
    QUANTIZED           the methods of quantization_config that can be taken over; none, if left
                        out
    ARCHITECTURE        the name of the class, where it is not the type's name and ForCausalLM
    facts(keys, hidden, heads)               fields of ModelSpec that are the type's own (those that
                                             `configuration` asks the others for)
    biases(keys)                             which segments of biases there are
    unused(spec, name)  whether a tensor is of a part that no run uses; none is, if left out
    sources(spec, prefix, kind, layer, index, part)    where a segment is found (naming.Source)
"""

from types import ModuleType

from . import deepseek_v2, deepseek_v3, falcon, gemma2, gemma3_text, glm4_moe, gpt2, gpt_neox
from . import gpt_oss, granite, granitemoe, opt, phi3, phimoe

OWN: dict[str, ModuleType] = {
    "deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3, "falcon": falcon, "gemma2": gemma2,
    "gemma3_text": gemma3_text, "glm4_moe": glm4_moe, "gpt2": gpt2, "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss, "granite": granite, "granitemoe": granitemoe, "opt": opt, "phi3": phi3,
    "phimoe": phimoe,
}  # fmt: skip
"""By model type."""
