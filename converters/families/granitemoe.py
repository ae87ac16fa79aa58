"""GraniteMoE: Granite with experts in every layer, which lie in one tensor for a layer."""

from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

from .. import naming
from ..naming import EMBED as EMBED
from ..naming import HEAD as HEAD
from ..naming import PREFIXES as PREFIXES
from ..naming import Source
from . import granite

DEFAULTS = granite.DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2}
KEYS = granite.KEYS


def facts(keys, hidden: int, heads: int) -> dict:
    """Granite's, and the experts'. A softmax over the logits of the chosen ones is one over all,
    made to add up to 1."""
    found, layers = granite.facts(keys, hidden, heads), keys.count("num_hidden_layers")
    return found | {
        "routed": (True,) * layers, "n_experts": keys.count("num_local_experts"),
        "top_k": keys.count("num_experts_per_tok"), "normalize_top_k": True,
        "expert_intermediate": found["intermediate"],
    }  # fmt: skip


def biases(keys) -> frozenset[str]:
    """Those of attention."""
    return granite.biases(keys) & {"q_bias", "k_bias", "v_bias", "o_bias"}


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment is: in the names of the hub, or in those that transformers 5 saves."""
    base, shape = f"{prefix}layers.{layer}.block_sparse_moe.", (part.rows, part.cols)
    plain = naming.sources(spec, prefix, kind, layer, index, part)
    if part.name == "router":
        names = ("router.layer.weight", "router.weight")
        return [*(Source(base + name, shape) for name in names), *plain]
    if kind == Kind.EXPERT and part.name == "down":
        name, whole = "output_linear.weight", (spec.n_experts, *shape)
        return [Source(base + name, whole, index * part.rows), *plain]
    if kind == Kind.EXPERT:
        name, whole = "input_linear.weight", (spec.n_experts, 2 * part.rows, part.cols)
        first = (2 * index + (part.name == "up")) * part.rows
        return [Source(base + name, whole, first), *plain]
    return plain
