"""Llama (arXiv 2302.13971, 2407.21783): grouped-query attention, RoPE, gated FFNs."""

from .decoder import Decoder
from .layers import Dense


class Model(Decoder):
    """Each layer has one dense FFN."""

    def feed_forward(self, index: int) -> list[type]:
        return [Dense]
