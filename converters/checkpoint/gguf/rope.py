"""Rotary embedding in GGUF's metadata and tensors → what a config.json says of it."""

from __future__ import annotations

import math

import numpy as np

from edgemem.errors import CheckpointError, UnsupportedError

from ...rope import longrope_attention_factor
from .metadata import Metadata
from .naming import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from .tensors import GgufTensor

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants of every Llama from 3.1 on; only the factor differs."""
_FACTOR_TOLERANCE = 4e-6
"""Relative: the converter computes factors in 32-bit floats, and stores them as such."""


def share_of(metadata: Metadata, head_dim: int) -> float | None:
    """What a config calls partial_rotary_factor; None for 1. A head's share of so many numbers is
    cut off after the point, so that half a number more does no harm."""
    dims = metadata.count(".rope.dimension_count", head_dim)
    if not 2 <= dims <= head_dim:
        raise metadata.unsupported(".rope.dimension_count", f"2 to the size of a head, {head_dim}")
    return None if dims == head_dim else (dims + 0.5) / head_dim


def longrope(metadata: Metadata, tensors: dict[str, GgufTensor]) -> dict:
    """Keys of a config whose factors are in the file; {} where there are none.

    The attention factor, which the file has in 32 bits, follows from the two lengths; if it is
    another, it is that of the file.
    """
    lacking = [name for name in (LONG_FACTORS, SHORT_FACTORS) if name not in tensors]
    if len(lacking) == 2:
        return {}
    if lacking:
        raise CheckpointError(f"reading {metadata.path}: it lacks the tensor {lacking[0]}")
    original = metadata.count(".rope.scaling.original_context_length")
    if original < 1:
        raise metadata.error(".rope.scaling.original_context_length", "is out of range")
    scaling = {
        "rope_type": "longrope",
        "long_factor": _factors(metadata, tensors[LONG_FACTORS]).tolist(),
        "short_factor": _factors(metadata, tensors[SHORT_FACTORS]).tolist(),
    }
    expected = longrope_attention_factor(metadata.count(".context_length") / original, original)
    told = metadata.number(".rope.scaling.attn_factor", expected)
    if not math.isclose(told, expected, rel_tol=1e-6):
        scaling["attention_factor"] = told
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _factors(metadata: Metadata, tensor: GgufTensor) -> np.ndarray:
    """The numbers of a vector in F32, which are finite and above 0; float64."""
    if len(tensor.shape) != 1 or tensor.type_name != "F32":
        raise CheckpointError(
            f"reading {metadata.path}: {tensor.name} is {tensor.type_name} of the shape "
            f"{list(tensor.shape)}, not a vector in F32"
        )
    with np.errstate(invalid="ignore"):  # signalling NaN
        factors = tensor.read_rows(0, 1)[0].view(np.float32).astype(np.float64)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise CheckpointError(f"reading {metadata.path}: {tensor.name} holds bad numbers")
    return factors


def rope_scaling(metadata: Metadata, tensors: dict[str, GgufTensor], head_dim: int) -> dict | None:
    """What a config calls rope_scaling; None for none, and for longrope (see `longrope`)."""
    linear = metadata.number(".rope.scale_linear", 0.0)  # the key of the first files
    kind = metadata.text(".rope.scaling.type", "linear" if linear else "none")
    factor = metadata.number(".rope.scaling.factor", linear)
    attention = metadata.number(".rope.scaling.attn_factor", 1.0)
    if attention != 1.0 and kind != "yarn" and LONG_FACTORS not in tensors:
        raise metadata.unsupported(".rope.scaling.attn_factor", "1")
    if ROPE_FACTORS in tensors:
        return _llama3(metadata, tensors[ROPE_FACTORS], head_dim)
    if kind == "none" or (kind == "longrope" and LONG_FACTORS in tensors):
        return None
    if kind not in ("linear", "yarn"):
        raise metadata.unsupported(".rope.scaling.type", "none, linear, yarn")
    if factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = metadata.count(".rope.scaling.original_context_length", None)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or metadata.count(".context_length"),
        "attention_factor": attention * (1.0 + 0.1 * math.log(max(factor, 1.0))),
        "beta_fast": metadata.number(".rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(".rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(metadata: Metadata, tensor: GgufTensor, head_dim: int) -> dict | None:
    """The constants of Llama 3's scaling that give these factors, every one of them.

    The file holds what each frequency is divided by (`generate_extra_tensors` of LlamaModel in
    convert_hf_to_gguf.py); the constants are found again and proved by computing the factors from
    them, so that the model's frequencies are those of the original config, not of rounded factors.
    """
    if tensor.shape != (head_dim // 2,) or tensor.type_name != "F32" or head_dim < 2:
        raise CheckpointError(
            f"reading {metadata.path}: {ROPE_FACTORS} is {tensor.type_name} of the shape "
            f"{list(tensor.shape)}, not F32 with half a head, {head_dim // 2}"
        )
    factors = _factors(metadata, tensor)
    if (factors == 1).all():
        return None
    theta = metadata.number(".rope.freq_base", 10000.0)
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    for constants in (_LLAMA3, _fitted(frequencies, factors)):
        scaling = constants and _proved(constants, frequencies, factors)
        if scaling:
            return {"rope_type": "llama3"} | scaling
    raise UnsupportedError(
        f"reading {metadata.path}: {ROPE_FACTORS} does not follow Llama 3's rule, whatever its "
        "constants; no other rule is supported"
    )


def _fitted(frequencies: np.ndarray, factors: np.ndarray) -> dict:
    """Constants from the ramp, on which 1 / factor is linear in the frequency; {} without one.

    Only the ratios of the three constants matter, so the lower one may be taken as 1.
    """
    top = factors.max()
    ramp = (factors > 1) & (factors < top)
    if ramp.sum() < 2:
        return {}
    smooth = (1 / factors[ramp] - 1 / top) / (1 - 1 / top)
    slope, offset = np.polyfit(frequencies[ramp], smooth, 1)
    if not (slope > 0 and offset < 0):
        return {}
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": float(f"{1 - 1 / offset:.5g}"),
        "original_max_position_embeddings": round(-2 * math.pi * slope / offset),
    }


def _proved(constants: dict, frequencies: np.ndarray, factors: np.ndarray) -> dict | None:
    """The constants with their factor, if all factors follow from them; else None.

    The rule is that of `edgemem/models/rope.py`: a share of a frequency is kept, the rest slowed.
    """
    low, high = constants["low_freq_factor"], constants["high_freq_factor"]
    turns = constants["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    slowest = keep.argmin()
    rest = 1 / factors[slowest] - keep[slowest]
    factor = float(f"{(1 - keep[slowest]) / rest:.5g}") if rest > 0 else 0.0
    if not 0 < factor < 1e9:
        return None
    expected = 1 / (keep + (1 - keep) / factor)
    proved = np.allclose(factors, expected, rtol=_FACTOR_TOLERANCE, atol=0)
    return constants | {"factor": factor} if proved else None
