"""Gemma 2 (arXiv 2408.00118): norms before and after each block, capped scores and logits, a window
over the keys of every second layer."""

from .llama import Model as Model
