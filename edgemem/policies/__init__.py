"""Cache policies: demand in, ranks out. The live streamer and the replay of traces share them."""

import numpy as np

from .frequency import Lfu, Static
from .next_use import NextUse
from .policy import Policy
from .recency import Lru

POLICIES = {policy.name: policy for policy in (NextUse, Lru, Lfu, Static)}
"""By name; the first is the default. `Static` also takes a popularity."""
DEFAULT = NextUse.name


def build(
    name: str, layer_of: np.ndarray, n_layers: int, popularity: np.ndarray | None = None
) -> Policy:
    """The policy of that name; see `Policy`. Raises ValueError for a name that is none of POLICIES,
    or "static" without a popularity."""
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is none of {', '.join(POLICIES)}")
    if name != Static.name:
        return POLICIES[name](layer_of, n_layers)
    if popularity is None:
        raise ValueError("the static policy needs a profile that says what is popular")
    return Static(layer_of, n_layers, popularity)


__all__ = ["DEFAULT", "POLICIES", "Lfu", "Lru", "NextUse", "Policy", "Static", "build"]
