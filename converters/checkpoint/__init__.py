"""Checkpoints: someone else's weights, read as the hostile files that they may be."""

from pathlib import Path

from .gguf import GgufCheckpoint, is_gguf
from .source import Checkpoint
from .tensors import Tensor

__all__ = ["Checkpoint", "GgufCheckpoint", "Tensor", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint | GgufCheckpoint:
    """Open a Hugging Face folder or a GGUF file; raises as their classes do."""
    return GgufCheckpoint(path) if is_gguf(path) else Checkpoint(path)
