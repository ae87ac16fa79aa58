"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, FFNs without a gate."""

from .llama import Model as Model
