"""Checkpoints: someone else's weights, read as the hostile files that they may be."""

import os
from pathlib import Path

from .gguf import GgufCheckpoint, is_gguf
from .source import Checkpoint
from .tensors import Tensor

__all__ = ["Checkpoint", "GgufCheckpoint", "Tensor", "is_checkpoint", "open_checkpoint"]


def is_checkpoint(path: Path) -> bool:
    """Whether a path is to be read as a checkpoint: a folder, or what looks like GGUF."""
    return os.path.isdir(path) or is_gguf(path)


def open_checkpoint(path: Path) -> Checkpoint | GgufCheckpoint:
    """Open a Hugging Face folder or a GGUF file; raises as their classes do."""
    return GgufCheckpoint(path) if is_gguf(path) else Checkpoint(path)
