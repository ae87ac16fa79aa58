"""Architectures whose GGUF files are not read as Llama's are, each in a module of its own.

Such a module says, or leaves out what it has in common with the rest,
    MODEL_TYPE        Hugging Face's name
    READS             keys of metadata that it gives a meaning, and others must not have
    NAMES, TABLES     names of tensors of a layer, and of none, that others do not have or have for
                      something else: GGUF's → Hugging Face's
    EPS               the key of what norms add before they divide
    LAYERS            what comes before the number of a layer in NAMES
    INTERLEAVED       whether rows of q and k are, as in files of Llama
    config(metadata, tensors, config)    keys of config.json, beside those that all have

What a file holds in another form than the checkpoint (norms whose weight has 1 added, matrices
turned around) gets a name of its own, which converters/families knows.
"""

from types import ModuleType

from . import deepseek2, gemma2, gemma3, glm4moe, gpt2, gpt_oss, gptneox, granite, granitemoe
from . import phi3, phimoe

OWN: dict[str, ModuleType] = {
    "deepseek2": deepseek2, "gemma2": gemma2, "gemma3": gemma3, "glm4moe": glm4moe, "gpt2": gpt2,
    "gpt-oss": gpt_oss, "gptneox": gptneox, "granite": granite, "granitemoe": granitemoe,
    "phi3": phi3, "phimoe": phimoe,
}  # fmt: skip
"""By architecture."""
