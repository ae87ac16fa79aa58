"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

from .layers import Decoder, Experts


class Model(Decoder):
    def feed_forward(self, index: int) -> list[type]:
        return [Experts]
