"""Qwen2 (arXiv 2407.10671): Llama with biases on q, k and v; some layers may have a window."""

from .llama import Model as Model
