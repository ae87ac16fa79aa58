"""Qwen3 (arXiv 2505.09388): Llama with an RMSNorm over each head's query and key."""

from .llama import Model as Model
