"""Rotary embedding in a Hugging Face config → RopeSpec.

See RotaryEmbeddingConfigMixin and the functions in transformers' modeling_rope_utils.py.
"""

import math

import numpy as np

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.spec import ROPE_TYPES, RopeSpec

_OTHER_NAMES = {"su": "longrope"}


def finite(key: str, value) -> float:
    """A finite float of a JSON value that is a number (and no bool)."""
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise CheckpointError(f"config.json: {key} = {value!r:.80} is not a finite number")
    return float(value)


def rope_of(keys, head_dim: int | None = None) -> RopeSpec:
    """That of all layers. `head_dim` is given where a part of a head may be rotated, and longrope
    may be."""
    rope = keys.config.get("rope_scaling") or keys.config.get("rope_parameters") or {}
    return read_rope(keys, rope, keys.number("rope_theta", 1e4), head_dim)


def read_rope(keys, rope, theta: float, head_dim: int | None = None) -> RopeSpec:
    """What an object of the config says, with the base of where it names none.

    Raises CheckpointError for a bad value, UnsupportedError for a type that no model here has.
    """
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: rope_scaling = {rope!r:.80} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if head_dim and isinstance(kind, str):
        kind = _OTHER_NAMES.get(kind, kind)
    kinds = ROPE_TYPES if head_dim else [name for name in ROPE_TYPES if name != "longrope"]
    if kind not in kinds or any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedError(
            f"config.json: the rope type {kind!r:.80} is not supported; "
            f"supported are {', '.join(kinds)}, one for all layers"
        )
    own = rope.get("rope_theta")
    values = {"type": kind, "theta": theta if own is None else finite("rope_theta", own)}
    values["dims"] = _dims(keys, rope, head_dim)
    if kind != "default":
        values |= _scaling(keys, kind, rope)
    return RopeSpec(**values)


def _dims(keys, rope: dict, head_dim: int | None) -> int:
    share = rope.get("partial_rotary_factor")
    if share is None:
        share = keys.number("partial_rotary_factor", 1.0)
    share = finite("partial_rotary_factor", share)
    if share == 1.0:
        return 0
    dims = int(head_dim * share) if head_dim and 0 < share < 1 else 0
    if dims < 2 or dims % 2:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor = {share!r:.80} is not supported"
        )
    return dims


def _scaling(keys, kind: str, rope: dict) -> dict:
    """The fields of RopeSpec that scale positions, for all types but "default"."""
    positions = keys.count("max_position_embeddings")
    if kind in ("linear", "dynamic"):
        return {"factor": _need(rope, "factor")}
    original = keys.get("original_max_position_embeddings", (int,), "a whole number")
    if original is None:
        original = rope.get("original_max_position_embeddings", positions)
    if type(original) is not int or not 1 <= original < 1 << 31:
        raise CheckpointError(
            f"config.json: original_max_position_embeddings = {original!r:.80} is out of range"
        )
    values = {"original_positions": original}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return values | {name: _need(rope, name) for name in names}
    factor = rope.get("factor")
    factor = positions / original if factor is None else finite("factor", factor)
    if kind == "longrope":
        return values | _longrope(rope, factor, original)
    values |= {"factor": factor, "attention_factor": _attention_factor(rope, factor)}
    values["beta_fast"] = finite("beta_fast", rope.get("beta_fast") or 32)
    values["beta_slow"] = finite("beta_slow", rope.get("beta_slow") or 1)
    return values | {"truncate": bool(rope.get("truncate", True))}


def _need(rope: dict, name: str) -> float:
    if name not in rope:
        raise CheckpointError(f"config.json: the rotary embedding lacks its {name}")
    return finite(name, rope[name])


def _longrope(rope: dict, factor: float, original: int) -> dict:
    """Its two lists of factors; `factor` itself is for the attention factor alone."""
    found = {}
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if not isinstance(factors, list):
            raise CheckpointError(f"config.json: the rotary embedding lacks its list {name}")
        # They are used in 32 bits, and a GGUF has no more.
        found[f"{name}s"] = tuple(float(np.float32(finite(name, value))) for value in factors)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = longrope_attention_factor(factor, original)
    return found | {"attention_factor": finite("attention_factor", attention)}


def longrope_attention_factor(factor: float, original: int) -> float:
    """What cosines and sines are scaled by where positions reach `factor` times further."""
    if factor <= 1.0 or original < 2:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _attention_factor(rope: dict, factor: float) -> float:
    """What YaRN scales cosines and sines by."""
    if rope.get("attention_factor") is not None:
        return finite("attention_factor", rope["attention_factor"])
    mscale, all_dim = rope.get("mscale") or 0, rope.get("mscale_all_dim") or 0
    if mscale and all_dim:
        scale, all_scale = finite("mscale", mscale), finite("mscale_all_dim", all_dim)
        return yarn_mscale(factor, scale) / yarn_mscale(factor, all_scale)
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, scale: float) -> float:
    """By how much YaRN raises scores where positions reach `factor` times further."""
    value = 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
    if value <= 0:
        raise CheckpointError(f"config.json: mscale = {scale} is out of range")
    return value
