"""GGUF checkpoints (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), by our own reader.

`GgufCheckpoint` presents what `Checkpoint` presents of a Hugging Face folder: the config and the
tokenizer are derived from the metadata, tensors have Hugging Face names, and rows that llama.cpp
reordered are put back in order as they are read.
"""

from .checkpoint import GgufCheckpoint, is_gguf

__all__ = ["GgufCheckpoint", "is_gguf"]
