"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): routed experts beside a gated shared expert; some
layers may have one dense FFN instead."""

from .decoder import Decoder
from .layers import Dense, Experts, SharedExpert


class Model(Decoder):
    """Each layer has routed experts and, if there is one, the shared one; or one dense FFN."""

    def feed_forward(self, index: int) -> list[type]:
        if not self.spec.routed[index]:
            return [Dense]
        return [Experts, SharedExpert] if self.spec.shared_intermediate else [Experts]
