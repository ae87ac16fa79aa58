"""Llama (arXiv 2302.13971, 2407.21783): grouped-query attention, RoPE, a gated FFN in each layer."""

from .layers import Decoder, Dense


class Model(Decoder):
    def feed_forward(self, index: int) -> list[type]:
        return [Dense]
