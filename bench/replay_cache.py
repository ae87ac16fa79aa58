"""A cache without bytes: serves recorded demand under any policy, and under Belady's.

The rules are the residency's: the demand of one layer is pinned as a whole, then each miss takes a
free slot of its layout class, or that of the bundle with the lowest rank that is not pinned (the
first of equals). Demand that exceeds a class's slots is served in parts.
"""

import numba
import numpy as np

from bench.replay_traces import Routing
from edgemem.policies import Policy

NEVER = 1 << 30
"""The time of a next use that does not come; float32 holds it exactly."""


class Belady(Policy):
    """Evicts what is used last of all, which no policy can beat. Knows one trace only.

    L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems
    Journal 5(2), 1966.
    """

    name = "belady"

    def __init__(self, routing: Routing):
        super().__init__(routing.layer_of, routing.n_layers)
        self._next = next_uses(routing.starts, routing.ids, len(routing.layer_of))
        self._starts_of_events = routing.starts
        self._event = 0
        self._ranks = np.full(len(routing.layer_of), -NEVER, np.float64)

    def observe(self, layer, ids, uses=None, tokens=1) -> None:
        first, stop = self._starts_of_events[self._event : self._event + 2]
        self._ranks[ids] = -self._next[first:stop]
        self._event += 1


@numba.njit(cache=True)
def next_uses(starts, ids, n_bundles):
    """For each demand the event of the next demand of the same bundle, or NEVER."""
    upcoming = np.full(n_bundles, NEVER, np.int64)
    found = np.empty(len(ids), np.int64)
    for event in range(len(starts) - 2, -1, -1):
        for i in range(starts[event], starts[event + 1]):
            found[i] = upcoming[ids[i]]
            upcoming[ids[i]] = event
    return found


@numba.njit(cache=True)
def serve(resident, free, class_of, ranks, ids):
    """Make `ids` resident, in parts if they exceed the slots; return how many were. `resident`
    (bool [n]) and `free` (slots of each class) are the cache, and change."""
    hits, first = 0, 0
    while first < len(ids):
        room = free.copy()
        for i in range(len(resident)):
            if resident[i]:
                room[class_of[i]] += 1
        stop = first
        while stop < len(ids) and room[class_of[ids[stop]]] > 0:
            room[class_of[ids[stop]]] -= 1
            stop += 1
        hits += _serve_part(resident, free, class_of, ranks, ids[first:stop])
        first = stop
    return hits


@numba.njit(cache=True)
def _serve_part(resident, free, class_of, ranks, ids):
    hits = 0
    pinned = np.zeros(len(resident), np.bool_)
    for i in ids:
        hits += resident[i]
        pinned[i] = True
    for i in ids:
        if resident[i]:
            continue
        if free[class_of[i]] > 0:
            free[class_of[i]] -= 1
        else:
            resident[_victim(resident, pinned, class_of, ranks, class_of[i])] = False
        resident[i] = True
    return hits


@numba.njit(cache=True)
def _victim(resident, pinned, class_of, ranks, wanted_class):
    victim = -1
    for i in range(len(resident)):
        can_go = resident[i] and not pinned[i] and class_of[i] == wanted_class
        if can_go and (victim < 0 or ranks[i] < ranks[victim]):
            victim = i
    return victim


def simulate(routing: Routing, policy: Policy, slots: tuple[int, ...]) -> np.ndarray:
    """Hits of each event, int64 [events], from an empty cache of `slots` per layout class."""
    if min(slots) < 1:
        raise ValueError(f"a cache of {slots} slots holds nothing")
    resident, free = np.zeros(len(routing.layer_of), np.bool_), np.array(slots, np.int64)
    hits = np.empty(len(routing.layers), np.int64)
    layers, tokens, starts = (a.tolist() for a in (routing.layers, routing.tokens, routing.starts))
    for event, layer in enumerate(layers):
        where = slice(starts[event], starts[event + 1])
        ids = routing.ids[where]
        policy.observe(layer, ids, routing.uses[where], tokens[event])
        hits[event] = serve(resident, free, routing.class_of, policy.ranks(layer), ids)
    return hits


def hit_rate(routing: Routing, hits: np.ndarray, first_step: int) -> float:
    """Share of demand that was hit from `first_step` on."""
    events = routing.steps >= first_step
    return float(hits[events].sum() / np.diff(routing.starts)[events].sum())
