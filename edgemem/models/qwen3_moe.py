"""Qwen3-MoE (arXiv 2505.09388): Qwen3 attention; routed experts, or a dense FFN in some layers."""

from .decoder import Decoder
from .layers import Dense, Experts


class Model(Decoder):
    """Each layer has routed experts, or one dense FFN."""

    def feed_forward(self, index: int) -> list[type]:
        return [Experts] if self.spec.routed[index] else [Dense]
