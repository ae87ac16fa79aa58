"""The best that any cache could have done with a demand that is known: the yardstick of policies.

L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal
5(2), 1966: evict what is used last of all.
"""

from collections.abc import Sequence

import numpy as np

from .planner import round_size

NEVER = 1 << 30
"""The event of a next use that does not come."""


def hits(
    starts: np.ndarray, ids: np.ndarray, class_of: Sequence[int], slots: Sequence[int]
) -> np.ndarray:
    """How much of each event's demand is there already, int64 [events], from an empty cache.

    Event e is what one layer demands at once: ids[starts[e]:starts[e+1]], each of them once.
    `class_of` [bundles] is the layout class of each, `slots` is how many fit of each class. The
    rules are the streamer's: demand is pinned as a whole, or round by round where it exceeds the
    slots.
    """
    class_of, free = np.asarray(class_of, np.int64), np.array(slots, np.int64)
    room, n = free[class_of], len(class_of)
    resident, pinned = np.zeros(n, bool), np.zeros(n, bool)
    last = np.zeros(n, np.int64)  # the larger, the later it is used; no two are equal
    members = [np.flatnonzero(class_of == c) for c in range(len(free))]
    found, following = np.zeros(len(starts) - 1, np.int64), next_uses(starts, ids, n)
    for event in range(len(found)):
        where = slice(starts[event], starts[event + 1])
        wanted = ids[where]
        last[wanted] = following[where] * n - wanted
        size, before = round_size(len(wanted), int(room[wanted].min())), wanted[:0]
        for start in range(0, len(wanted), size):
            part = wanted[start : start + size]
            missing = part[~resident[part]]
            found[event] += len(part) - len(missing)
            pinned[part] = True
            for c in np.unique(class_of[missing]).tolist():
                count = int((class_of[missing] == c).sum())
                _make_room(count - int(free[c]), members[c], resident, pinned, last)
                free[c] = max(0, free[c] - count)
            resident[missing] = True
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


def next_uses(starts: np.ndarray, ids: np.ndarray, n_bundles: int) -> np.ndarray:
    """For each of `ids` the event that demands the same bundle next, or NEVER: int64 [ids]."""
    upcoming = np.full(n_bundles, NEVER, np.int64)
    found = np.empty(len(ids), np.int64)
    for event in range(len(starts) - 2, -1, -1):
        where = slice(starts[event], starts[event + 1])
        found[where] = upcoming[ids[where]]
        upcoming[ids[where]] = event
    return found
