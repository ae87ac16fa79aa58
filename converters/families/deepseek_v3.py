"""DeepSeek-V3 and R1, Moonlight, as GGUF also Kimi K2: DeepSeek-V2 with experts chosen in groups by
biased sigmoids.

Source: modeling_deepseek_v3.py in transformers.
"""

from edgemem.errors import CheckpointError, UnsupportedError

from . import deepseek_v2
from .deepseek_v2 import EMBED as EMBED
from .deepseek_v2 import HEAD as HEAD
from .deepseek_v2 import KEYS as KEYS
from .deepseek_v2 import PREFIXES as PREFIXES
from .deepseek_v2 import biases as biases
from .deepseek_v2 import sources as sources
from .glm4_moe import unused as unused

DEFAULTS = deepseek_v2.DEFAULTS | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 128, "max_position_embeddings": 4096, "bos_token_id": 0,
    "eos_token_id": 1, "first_k_dense_replace": 3, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
_NOT_NULL = ("norm_topk_prob", "rope_interleave", "n_group", "topk_group")
"""Keys whose null is not what it means that they are absent."""


def facts(keys, hidden: int, heads: int) -> dict:
    """Fields of ModelSpec."""
    for name in _NOT_NULL:
        if keys.config.get(name, True) is None:
            raise CheckpointError(
                f"config.json: {name} = null has no meaning for deepseek_v3; give a value"
            )
    found = deepseek_v2.common_facts(keys)
    method = keys.get("topk_method", (str,), "a name")
    if method != "noaux_tc":
        raise UnsupportedError(
            f"config.json: topk_method = {method!r:.80} is not supported for deepseek_v3; "
            "supported is noaux_tc"
        )
    if not any(found["routed"]):
        return found
    return found | deepseek_v2.experts(keys, keys.count("n_group") > 1, "sigmoid")
