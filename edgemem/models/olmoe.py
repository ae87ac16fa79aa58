"""OLMoE (arXiv 2409.02060): experts in every layer, norms over all heads' queries and keys at once."""

from .mixtral import Model as Model
