"""The best that any cache could have done with a demand that is known: the yardstick of policies.

L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal
5(2), 1966: evict what is used last of all.
"""

from collections.abc import Sequence

import numpy as np

from .planner import round_size

NEVER = 1 << 30
"""The event of a next use that does not come."""


def hits(demand: Sequence[np.ndarray], class_of: Sequence[int], slots: Sequence[int]) -> np.ndarray:
    """How much of each event's demand is there already, int64 [events], from an empty cache.

    An event is what one layer demands at once: bundles, each of them once. `class_of` [bundles] is
    the layout class of each, `slots` is how many fit of each class. The rules are the streamer's:
    demand is pinned as a whole, or round by round where it exceeds the slots.
    """
    class_of, free = np.asarray(class_of, np.int64), np.array(slots, np.int64)
    room, n = free[class_of], len(class_of)
    resident, pinned = np.zeros(n, bool), np.zeros(n, bool)
    last = np.zeros(n, np.int64)  # the larger, the later it is used; no two are equal
    members = [np.flatnonzero(class_of == c) for c in range(len(free))]
    found = np.zeros(len(demand), np.int64)
    for event, (ids, following) in enumerate(zip(demand, next_uses(demand, n), strict=True)):
        last[ids] = following * n - ids
        size, before = round_size(len(ids), int(room[ids].min(initial=n))), ids[:0]
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            missing = part[~resident[part]]
            found[event] += len(part) - len(missing)
            pinned[part] = True
            for c in np.unique(class_of[missing]).tolist():
                wanted = missing[class_of[missing] == c]
                _make_room(len(wanted) - int(free[c]), members[c], resident, pinned, last)
                free[c] = max(0, free[c] - len(wanted))
                resident[wanted] = True
            pinned[before] = False
            before = part
        pinned[before] = False
    return found


def _make_room(count: int, members, resident, pinned, last) -> None:
    """Evict `count` of a class: those used last of all that are not pinned."""
    if count <= 0:
        return
    victims = members[resident[members] & ~pinned[members]]
    order = np.argpartition(last[victims], len(victims) - count)
    resident[victims[order[len(victims) - count :]]] = False


def next_uses(demand: Sequence[np.ndarray], n_bundles: int) -> list[np.ndarray]:
    """For all that each event demands, the event that demands it next, or NEVER."""
    upcoming = np.full(n_bundles, NEVER, np.int64)
    found = []
    for event in range(len(demand) - 1, -1, -1):
        found.append(upcoming[demand[event]])
        upcoming[demand[event]] = event
    return found[::-1]
