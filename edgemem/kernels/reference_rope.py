"""The meaning of rotary embeddings, in plain numpy at float64: a part of `reference`."""

from __future__ import annotations

import math

import numpy as np

from ..spec import RopeSpec


def frequencies(rope: RopeSpec, head_dim: int, max_positions: int, length: int) -> np.ndarray:
    """Radians per position for each pair of a head that is rotated, float64 [dims // 2].

    `length` is how many positions the sequence has once the ids being fed are in: the "dynamic"
    type stretches its base when that exceeds `max_positions`; no other type looks at it.
    Of "longrope" that decides between two lists of factors. Definitions as in transformers'
    modeling_rope_utils.
    """
    theta, head_dim = rope.theta, rope.dims or head_dim
    if rope.type == "dynamic":
        stretch = rope.factor * max(length, max_positions) / max_positions - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return _llama3_frequencies(rope, plain)
    if rope.type == "yarn":
        return _yarn_frequencies(rope, plain, head_dim)
    if rope.type == "longrope":
        return plain / np.array(rope.long_factors if rope.is_long(length) else rope.short_factors)
    return plain


def attention_factor(rope: RopeSpec, length: int) -> float:
    """What sines and cosines are multiplied by."""
    long = rope.long_attention_factor if rope.is_long(length) else 0.0
    return long or rope.attention_factor


def _llama3_frequencies(rope: RopeSpec, plain: np.ndarray) -> np.ndarray:
    """Long waves are stretched by factor, short ones kept, others interpolated (Llama 3.1)."""
    turns = rope.original_positions * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - blend) * plain / rope.factor + blend * plain
    scaled = np.where(turns < rope.low_freq_factor, plain / rope.factor, between)
    return np.where(turns > rope.high_freq_factor, plain, scaled)


def _yarn_frequencies(rope: RopeSpec, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """A ramp over the pairs from kept to stretched (Peng et al., arXiv 2309.00071)."""

    def pair_that_turns(count: float) -> float:
        wave = rope.original_positions / (count * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def rotate(x: np.ndarray, positions: np.ndarray, freqs: np.ndarray, scale: float) -> np.ndarray:
    """Rotary embedding of x [n, heads, D]: with `freqs` [F], element i turns with i + F; both are
    times `scale`. Elements from 2 F on stay as they are."""
    angles = positions[:, None, None] * freqs
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    first, second, rest = np.split(x, [len(freqs), 2 * len(freqs)], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
