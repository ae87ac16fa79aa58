"""Gemma 3, text."""

from . import gemma2

MODEL_TYPE = "gemma3_text"
READS, NAMES, TABLES = (".final_logit_softcapping",), gemma2.NAMES, gemma2.TABLES

_LAYERS_OF_27B = 62


def config(metadata, tensors: dict, config: dict) -> dict:
    """Source: Gemma3Model in convert_hf_to_gguf.py. The window is there where layers slide, five of
    six by a rule that no file states."""
    window = metadata.count(".attention.sliding_window", 0)
    pattern = ".attention.sliding_window_pattern"
    if pattern in metadata and metadata.count(pattern) != 6:
        raise metadata.unsupported(pattern, "6")
    slides = {"sliding_window": window} if window else {"sliding_window_pattern": 1}
    return gemma2.common_config(tensors, config, _LAYERS_OF_27B) | slides | {
        "rope_local_base_freq": metadata.number(".rope.freq_base_swa", 10000.0),
        "rope_theta": metadata.number(".rope.freq_base", 1000000.0),
        "final_logit_softcapping": metadata.number(".final_logit_softcapping", 0.0) or None,
    }  # fmt: skip
