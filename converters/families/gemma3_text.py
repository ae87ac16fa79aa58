"""Gemma 3, text: Gemma 2 with norms of queries and keys, no caps, and another rope for the layers
that slide, five of six.

Source: modeling_gemma3.py in transformers.
"""

from edgemem.errors import UnsupportedError
from edgemem.spec import RopeSpec

from ..rope import read_rope
from . import gemma2
from .gemma2 import EMBED as EMBED
from .gemma2 import HEAD as HEAD
from .gemma2 import PREFIXES as PREFIXES
from .gemma2 import biases as biases
from .gemma2 import sources as sources

ARCHITECTURE = "Gemma3ForCausalLM"
DEFAULTS = gemma2.DEFAULTS | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6,
}  # fmt: skip
KEYS = gemma2.KEYS
_ROPES = ("full_attention", "sliding_attention")


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    layers, step = keys.count("num_hidden_layers"), keys.count("sliding_window_pattern")
    if gemma2.cap(keys, "attn_logit_softcapping", {}):
        raise UnsupportedError(
            "config.json: attn_logit_softcapping is not supported for gemma3_text; no such model "
            "uses it"
        )
    sliding = [step > 0 and (i + 1) % step != 0 for i in range(layers)]
    full, local = _ropes(keys)
    return gemma2.common_facts(keys, hidden, sliding) | {
        "qk_norm": "head", "rope": full, "local_rope": local,
        "logit_cap": gemma2.cap(keys, "final_logit_softcapping", {}),
    }  # fmt: skip


def _ropes(keys) -> tuple[RopeSpec, RopeSpec]:
    """That of layers that see all, and that of those that slide."""
    nested = keys.config.get("rope_parameters") or {}
    if not isinstance(nested, dict) or not set(nested) <= set(_ROPES):
        raise UnsupportedError(
            f"config.json: rope_parameters is not supported here but for {', '.join(_ROPES)}"
        )
    full, local = (nested.get(name) or {} for name in _ROPES)
    scaling = keys.config.get("rope_scaling") or {}
    if isinstance(full, dict) and isinstance(scaling, dict):
        full = full | scaling
    return (
        read_rope(
            keys, full if isinstance(scaling, dict) else scaling, keys.number("rope_theta", 1e6)
        ),
        read_rope(keys, local, keys.number("rope_local_base_freq", 1e4)),
    )
