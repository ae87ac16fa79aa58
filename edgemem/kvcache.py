"""One session's keys and values: f16, per layer [n_kv_heads, context, head_dim padded to 16]."""

import mmap

from ._native import Slab, ffi
from .dtypes import LANES, round_up
from .spec import ModelSpec


def cache_bytes(spec: ModelSpec, context: int) -> int:
    """Bytes of a cache for `context` tokens."""
    padded = round_up(spec.head_dim, LANES)
    return spec.n_layers * 2 * spec.n_kv_heads * context * padded * 2


class KvCache:
    """Room for `context` tokens; `position` is how many are in.

    Memory is touched as it fills: `unused_bytes` are those that are not yet. With `huge` pages
    it is faster to reach, and touched in larger pieces.

    `rope_length` is the length that dynamic RoPE takes its frequencies from; whoever feeds tokens
    in chunks sets it to the length after the last, so that chunks do not change the answer.
    """

    def __init__(self, spec: ModelSpec, context: int, huge: bool = True):
        self.context = context
        self.position = 0
        self.rope_length = 0
        self._slab = Slab(cache_bytes(spec, context), huge)
        self._strips = 2 * spec.n_layers * spec.n_kv_heads
        self._row_bytes = cache_bytes(spec, 1) // self._strips
        self._touched = 0
        half = cache_bytes(spec, context) // (2 * spec.n_layers)
        self.layers = [
            ffi.new("em_attention *", {
                "n_heads": spec.n_heads, "n_kv_heads": spec.n_kv_heads, "head_dim": spec.head_dim,
                "window": min(spec.windows[i], context), "context": context,
                "k_cache": ffi.cast("uint16_t *", self._slab.address + 2 * i * half),
                "v_cache": ffi.cast("uint16_t *", self._slab.address + (2 * i + 1) * half),
            })
            for i in range(spec.n_layers)
        ]  # fmt: skip

    @property
    def bytes(self) -> int:
        return self._slab.bytes

    def touch(self, tokens: int) -> None:
        """Says that the first `tokens` tokens' memory is about to be written."""
        self._touched = max(self._touched, tokens)

    @property
    def unused_bytes(self) -> int:
        """Bytes that no token has touched: whole pages of each head's strip."""
        if not self._touched:
            return self.bytes
        pages = -(-self._touched * self._row_bytes // mmap.PAGESIZE) + 1
        return max(0, self.bytes - self._strips * pages * mmap.PAGESIZE)

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot truncate a cache of {self.position} tokens to {position}")
        self.position = position
