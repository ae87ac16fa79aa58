"""Granite (arXiv 2408.13359): Llama with multipliers of embeddings, attention scores, what blocks
add, and logits."""

from .llama import Model as Model
