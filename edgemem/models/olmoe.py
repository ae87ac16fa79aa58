"""OLMoE (arXiv 2409.02060): experts in every layer, q and k norms over all heads at once."""

from .mixtral import Model as Model
