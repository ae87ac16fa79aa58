"""Gemma 3, text (arXiv 2503.19786): Gemma 2 with norms of queries and keys in the place of caps,
and another rope where there is a window."""

from .llama import Model as Model
