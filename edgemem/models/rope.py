"""Rotary embedding frequencies, as the checkpoints' own library defines them for each type."""

import math

import numpy as np

from ..spec import RopeSpec


def inverse_frequencies(
    rope: RopeSpec, head_dim: int, max_positions: int, length: int
) -> np.ndarray:
    """float64 [dims / 2], of the numbers of a head that are rotated. Only "dynamic" and "longrope"
    depend on `length`, the tokens in the sequence."""
    head_dim = rope.dims or head_dim
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    theta = rope.theta
    if rope.type == "dynamic":
        reach = max(length, max_positions)
        stretch = rope.factor * reach / max_positions - (rope.factor - 1)
        theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    plain = 1.0 / theta**exponents
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, plain)
    if rope.type == "yarn":
        return _yarn(rope, plain, head_dim)
    if rope.type == "longrope":
        return plain / np.array(rope.long_factors if rope.is_long(length) else rope.short_factors)
    return plain


def attention_factor(rope: RopeSpec, length: int) -> float:
    """What cosines and sines are multiplied by."""
    long = rope.long_attention_factor if rope.is_long(length) else 0.0
    return long or rope.attention_factor


def frequencies_key(rope: RopeSpec, length: int) -> int:
    """Of lengths with one key the frequencies are the same."""
    return length if rope.type == "dynamic" else int(rope.is_long(length))


def _llama3(rope: RopeSpec, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, a ramp between."""
    turns = rope.original_positions * plain / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: RopeSpec, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071): interpolate dimensions that turn less than beta_slow times."""

    def dimension(turns: float) -> float:
        reach = math.log(rope.original_positions / (turns * 2 * math.pi))
        return head_dim * reach / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (1 - ramp) + plain / rope.factor * ramp
