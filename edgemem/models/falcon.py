"""Falcon (arXiv 2311.16867): attention beside an FFN without a gate, few keys for many queries."""

from .decoder import Decoder
from .layers import Dense


class Model(Decoder):
    """Each layer has one dense FFN."""

    def feed_forward(self, index: int) -> list[type]:
        return [Dense]
