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
    starts: np.ndarray, ids: np.ndarray, class_of: Sequence[int], slots: np.ndarray
) -> np.ndarray:
    """Which of `ids` are there already when they are demanded, bool [ids], from an empty cache.

    Event e is what one layer demands at once: ids[starts[e]:starts[e+1]], each of them once.
    `class_of` [bundles] is the layout class of each, `slots` how many there are of each class, for
    all events or, int64 [events, classes], for each. The rules are the streamer's: demand is pinned
    as a whole, or round by round where it exceeds the slots.
    """
    class_of, n = np.asarray(class_of, np.int64), len(class_of)
    cache = _Cache(class_of, int(np.shape(slots)[-1]))
    slots = np.broadcast_to(slots, (len(starts) - 1, len(cache.free)))
    following, found = next_uses(starts, ids, n), np.empty(len(ids), bool)
    for event, now in enumerate(slots):
        cache.resize(now)
        where = slice(starts[event], starts[event + 1])
        wanted = ids[where]
        cache.last[wanted] = following[where] * n - wanted
        size = round_size(class_of[wanted], now[class_of[wanted]])
        for start in range(0, len(wanted), size):
            part = wanted[start : start + size]
            found[starts[event] + start : starts[event] + start + len(part)] = cache.resident[part]
            # Beside a part, the one before it is still pinned.
            cache.load(part, wanted[max(0, start - size) : start + size])
    return found


def row_hits(
    starts: np.ndarray, ids: np.ndarray, set_of: np.ndarray, room: np.ndarray
) -> np.ndarray:
    """Likewise of rows, each event of one set: `set_of` [rows], `room` int64 [events, sets].

    Rows of an event need not be there together, and what is used may leave at once: no order of
    rounds has more of them.
    """
    following, found = next_uses(starts, ids, len(set_of)), np.empty(len(ids), bool)
    upcoming = np.full(len(set_of), NEVER, np.int64)
    resident = np.zeros(len(set_of), bool)
    held = [np.empty(0, np.int64)] * room.shape[1]
    for event, now in enumerate(room):
        where = slice(starts[event], starts[event + 1])
        wanted = ids[where]
        if not len(wanted):
            continue
        of = int(set_of[wanted[0]])
        resident[held[of]] = True
        found[where] = resident[wanted]
        resident[held[of]] = False
        upcoming[wanted] = following[where]
        there = np.union1d(held[of], wanted)
        if len(there) > now[of]:
            there = there[np.argpartition(upcoming[there], now[of])[: now[of]]]
        held[of] = there
    return found


class _Cache:
    """Which bundles are there. `last` int64 [bundles]: the larger, the later it is used."""

    def __init__(self, class_of: np.ndarray, n_classes: int):
        self.resident = np.zeros(len(class_of), bool)
        self.last = np.zeros(len(class_of), np.int64)
        self.free = np.zeros(n_classes, np.int64)
        self._slots = np.zeros(n_classes, np.int64)
        self._class_of = class_of
        self._pinned = np.zeros(len(class_of), bool)
        self._members = [np.flatnonzero(class_of == c) for c in range(n_classes)]

    def resize(self, slots: np.ndarray) -> None:
        if (slots == self._slots).all():
            return
        self.free += slots - self._slots
        self._slots = slots
        for c in np.flatnonzero(self.free < 0).tolist():
            self._make_room(c, 0)

    def load(self, part: np.ndarray, pinned: np.ndarray) -> None:
        missing = part[~self.resident[part]]
        classes = self._class_of[missing]
        self._pinned[pinned] = True
        for c in np.unique(classes).tolist():
            count = int((classes == c).sum())
            self._make_room(c, count)
            self.free[c] -= count
        self._pinned[pinned] = False
        self.resident[missing] = True

    def _make_room(self, c: int, count: int) -> None:
        """So many free slots of a class; those used last of all that are not pinned leave."""
        excess = count - int(self.free[c])
        if excess <= 0:
            return
        members = self._members[c]
        victims = members[self.resident[members] & ~self._pinned[members]]
        order = np.argpartition(self.last[victims], len(victims) - excess)
        self.resident[victims[order[len(victims) - excess :]]] = False
        self.free[c] += excess


def next_uses(starts: np.ndarray, ids: np.ndarray, n_bundles: int) -> np.ndarray:
    """For each of `ids` the event that demands the same bundle next, or NEVER: int64 [ids]."""
    upcoming = np.full(n_bundles, NEVER, np.int64)
    found = np.empty(len(ids), np.int64)
    for event in range(len(starts) - 2, -1, -1):
        where = slice(starts[event], starts[event + 1])
        found[where] = upcoming[ids[where]]
        upcoming[ids[where]] = event
    return found
