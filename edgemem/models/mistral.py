"""Mistral (arXiv 2310.06825): Llama with a sliding window over the keys of every layer."""

from .llama import Model as Model
