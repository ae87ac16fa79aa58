"""Cache policies: demand in, ranks out. The live streamer and the replay of traces share them."""

from .frequency import Lfu, Static
from .next_use import NextUse
from .policy import Policy
from .recency import Lru

POLICIES = {policy.name: policy for policy in (NextUse, Lru, Lfu, Static)}
"""By name; the first is the default. `Static` also takes a popularity."""
DEFAULT = NextUse.name

__all__ = ["DEFAULT", "POLICIES", "Lfu", "Lru", "NextUse", "Policy", "Static"]
