"""Checkpoints: someone else's weights, read as the hostile files that they may be."""

from .source import Checkpoint
from .tensors import Tensor

__all__ = ["Checkpoint", "Tensor"]
