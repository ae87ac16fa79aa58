"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

from .decoder import Decoder
from .layers import Experts


class Model(Decoder):
    """Each layer has routed experts."""

    def feed_forward(self, index: int) -> list[type]:
        return [Experts]
