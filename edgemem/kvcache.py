"""One session's keys and values: per layer, keys and then values, [n_kv_heads, context] rows.

A row is one head's head_dim numbers; of a model with a latent a value is that, and as a key only
what is rotated is kept, for the rest of it is the value. Values are rows; keys lie in groups of 16
rows, as weights do (FORMAT.md), so `context` is rounded up to 16. Numbers have one of three types:

* `f16`, the default: rounded to nearest even, zeros up to a multiple of 16.
* `f32`: as they were computed, zeros up to a multiple of 16.
* `q8_0`: zeros up to a multiple of 32, in blocks of 32 numbers x: an f16 scale d and 32 int8
  quants q; of a group of keys first all scales, then all quants, + 128. With peak = max |x|,
  q = x · 127 / peak rounded to nearest even, and d = peak / 127 rounded likewise to 11 significant
  bits and then to f16 (`reference.kept`); both are zero where the peak is, and d is NaN where an x
  is not finite. A number is read as d · q, which is exact.

Attention reads all of them as float32, with the same sums in the same order, but for keys of q8_0:
those are multiplied as q8_0 weights are, by queries that are rounded to such blocks too. Latents
are not.
"""

import math
import mmap

from ._native import Slab, ffi, lib
from .dtypes import BY_NAME, LANES
from .spec import ModelSpec


def rows_bytes(spec: ModelSpec, kv: str = "f16") -> tuple[int, int]:
    """Bytes of the key, and of the value, of one token and head in the type `kv`."""
    key = spec.rope.dims if spec.latent else spec.head_dim
    numbers = key, spec.latent or spec.head_dim
    return tuple(lib.em_kv_row_bytes(BY_NAME[kv].code, n) for n in numbers)


def token_bytes(spec: ModelSpec, kv: str = "f16") -> int:
    """Bytes of all keys and values of one token in the type `kv`."""
    return spec.n_layers * spec.n_kv_heads * sum(rows_bytes(spec, kv))


def cache_bytes(spec: ModelSpec, context: int, kv: str = "f16") -> int:
    """Bytes of a cache of the type `kv` for `context` tokens, rounded up to groups of keys."""
    return _rows(context) * token_bytes(spec, kv)


def unused_bytes(spec: ModelSpec, context: int, kv: str, tokens: int) -> int:
    """Bytes of a cache that so many tokens have not touched: whole pages of each head's strip."""
    size = cache_bytes(spec, context, kv)
    if not tokens:
        return size
    strips = [-(-_rows(tokens) * row // mmap.PAGESIZE) + 1 for row in rows_bytes(spec, kv)]
    return max(0, size - spec.n_layers * spec.n_kv_heads * sum(strips) * mmap.PAGESIZE)


def _scale(spec: ModelSpec) -> float:
    """That of scores: keys may have other numbers than a head's queries are made of."""
    return spec.attention_scale or (1 / math.sqrt(spec.head_dim) if spec.latent else 0.0)


def _rows(tokens: int) -> int:
    return -(-tokens // LANES) * LANES


class KvCache:
    """Room for `context` tokens; `position` is how many are in.

    Memory is touched as it fills: `unused_bytes` are those that are not yet. With `huge` pages
    it is faster to reach, and touched in larger pieces.

    `rope_length` is the length that dynamic RoPE takes its frequencies from; whoever feeds tokens
    in chunks sets it to the length after the last, so that chunks do not change the answer.
    """

    def __init__(
        self, spec: ModelSpec, context: int, kv: str = "f16", *, huge: bool = True
    ):  # fmt: skip
        self.context = context
        self.position = 0
        self.rope_length = 0
        self._slab = Slab(cache_bytes(spec, context, kv), huge)
        self._spec, self._kv = spec, kv
        self._touched = 0
        keys, values = (_rows(context) * spec.n_kv_heads * row for row in rows_bytes(spec, kv))
        starts = [self._slab.address + i * (keys + values) for i in range(spec.n_layers)]
        self.layers = [
            ffi.new("em_attention *", {
                "n_heads": spec.n_heads, "n_kv_heads": spec.n_kv_heads, "head_dim": spec.key_dim,
                "window": min(spec.windows[i], context), "kv_dtype": BY_NAME[kv].code,
                "rotary": spec.ropes[spec.rope_of(i)].dims, "latent": spec.latent,
                "scale": _scale(spec), "cap": spec.attention_cap,
                "context": _rows(context),
                "k_cache": ffi.cast("void *", start), "v_cache": ffi.cast("void *", start + keys),
            })
            for i, start in enumerate(starts)
        ]  # fmt: skip

    @property
    def bytes(self) -> int:
        return self._slab.bytes

    def touch(self, tokens: int) -> None:
        """Says that the first `tokens` tokens' memory is about to be written."""
        self._touched = max(self._touched, tokens)

    @property
    def unused_bytes(self) -> int:
        """Bytes that no token has touched."""
        return unused_bytes(self._spec, self.context, self._kv, self._touched)

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot truncate a cache of {self.position} tokens to {position}")
        self.position = position
