"""A cache without bytes: serves recorded demand under any policy, and under Belady's.

The rules are the streamer's and the residency's: the demand of one layer is pinned as a whole, then
each miss takes a free slot of its layout class, or that of the bundle with the lowest rank that is
not pinned (the first of equals). Demand that exceeds a class's slots comes in rounds of half of
them, two of which are pinned at a time. Nothing is read ahead.
"""

import numba
import numpy as np

from bench.replay_traces import Routing
from edgemem.planner import round_size
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
def serve(resident, free, class_of, ranks, ids, size):
    """Make `ids` resident, in rounds of `size`; return how many were. `resident` (bool [n]) and
    `free` (slots of each class) are the cache, and change."""
    hits = 0
    pinned = np.zeros(len(resident), np.bool_)
    for first in range(0, len(ids), size):
        part = ids[first : first + size]
        for i in part:
            hits += resident[i]
            pinned[i] = True
        for i in part:
            if not resident[i]:
                _place(resident, free, class_of, ranks, pinned, i)
        for i in ids[max(0, first - size) : first]:
            pinned[i] = False
    return hits


@numba.njit(cache=True)
def _place(resident, free, class_of, ranks, pinned, i):
    if free[class_of[i]] > 0:
        free[class_of[i]] -= 1
    else:
        resident[victim(resident, pinned, class_of, ranks, class_of[i])] = False
    resident[i] = True


@numba.njit(cache=True)
def victim(resident, pinned, class_of, ranks, wanted_class):
    found = -1
    for i in range(len(resident)):
        can_go = resident[i] and not pinned[i] and class_of[i] == wanted_class
        if can_go and (found < 0 or ranks[i] < ranks[found]):
            found = i
    return found


def simulate(
    routing: Routing, policy: Policy, slots: tuple[int, ...],
    resized: dict[int, list[tuple[int, ...]]] | None = None,
) -> np.ndarray:  # fmt: skip
    """Hits of each event, int64 [events], from an empty cache of `slots` per layout class.

    `resized` says what slots become, in turn, before the first event of a step: what exceeds them
    leaves by rank.
    """
    if min(slots) < 1:
        raise ValueError(f"a cache of {slots} slots holds nothing")
    resident, free = np.zeros(len(routing.layer_of), np.bool_), np.array(slots, np.int64)
    hits = np.empty(len(routing.layers), np.int64)
    columns = (routing.layers, routing.tokens, routing.steps, routing.starts)
    layers, tokens, steps, starts = (column.tolist() for column in columns)
    ranks, resized, slots = policy.ranks(0), dict(resized or {}), np.array(slots, np.int64)
    for event, layer in enumerate(layers):
        for now in resized.pop(steps[event], ()):
            resize(resident, free, routing.class_of, ranks, now - slots)
            slots = np.array(now, np.int64)
        where = slice(starts[event], starts[event + 1])
        ids = routing.ids[where]
        policy.observe(layer, ids, routing.uses[where], tokens[event])
        ranks, classes = policy.ranks(layer), routing.class_of[ids]
        size = round_size(classes, slots[classes])
        hits[event] = serve(resident, free, routing.class_of, ranks, ids, size)
    return hits


def resize(resident, free, class_of, ranks, more) -> None:
    """Give each class so many `more` slots, or fewer: then bundles leave where none are free."""
    free += more
    nothing = np.zeros(len(resident), np.bool_)
    for slot_class in np.flatnonzero(free < 0):
        while free[slot_class] < 0:
            resident[victim(resident, nothing, class_of, ranks, slot_class)] = False
            free[slot_class] += 1


def hit_rate(routing: Routing, hits: np.ndarray, first_step: int) -> float:
    """Share of demand that was hit from `first_step` on."""
    events = routing.steps >= first_step
    return float(hits[events].sum() / np.diff(routing.starts)[events].sum())
