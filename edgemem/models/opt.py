"""OPT (arXiv 2205.01068): full attention, learned positions, LayerNorm, FFNs without a gate."""

from .decoder import Decoder
from .layers import Dense


class Model(Decoder):
    """Each layer has one dense FFN."""

    def feed_forward(self, index: int) -> list[type]:
        return [Dense]
