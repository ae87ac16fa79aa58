"""What stays in memory and what streams: sizes in, slots out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SLOTS = 2
"""One bundle being computed while the next one lands."""


@dataclass(frozen=True)
class Plan:
    """`streamed` are bundle ids (uint32, ascending); all others, of `resident_bytes`, stay.

    Nothing streams where everything fits: then `streamed` is empty. `classes` are the layout
    classes of what streams; of each (int64 [n_classes]) `each` is a bundle's bytes, `counts` the
    bundles that there are, and `least` the slots that a step cannot do without.
    """

    streamed: np.ndarray
    resident_bytes: int
    classes: np.ndarray
    each: np.ndarray
    counts: np.ndarray
    least: np.ndarray

    @property
    def least_bytes(self) -> int:
        """Bytes of the slots that a step cannot do without."""
        return int(self.least @ self.each)

    def slots(self, room: int) -> dict[int, int]:
        """How many slots of each layout class `room` bytes hold: of each the same share of bundles.

        More room never gives a class fewer slots. Less than `least_bytes` counts as that.
        """
        more = self.counts - self.least
        span = int(more @ self.each)
        spare = min(max(0, room - self.least_bytes), span)
        slots = [low + n * spare // max(span, 1) for low, n in zip(self.least, more, strict=True)]
        return dict(zip(self.classes.tolist(), map(int, slots), strict=True))


def plan(
    layouts: np.ndarray, sizes: np.ndarray, may_stream: np.ndarray, at_once: np.ndarray, room: int
) -> Plan | None:
    """Share out `room` bytes: all bundles, or those that must be there and slots for the others.

    For each bundle: its layout class, its bytes, whether it may stream, and how many of its class
    one step wants at once. None if even one step's bundles do not fit.
    """
    if int(sizes.sum()) <= room:
        none = np.empty(0, np.int64)
        return Plan(none.astype(np.uint32), int(sizes.sum()), none, none, none, none)
    found = _least(layouts, sizes, may_stream, at_once)
    if not len(found.classes) or found.resident_bytes + found.least_bytes > room:
        return None
    return found


def round_size(classes: np.ndarray, room: np.ndarray) -> int:
    """How many of some bundles are held at once, by the layout class of each and its slots.

    All, or where they are more than the slots, in rounds half of those of the tightest class: the
    next round lands while one is computed.
    """
    if len(classes) <= room.min():
        return len(classes)
    counts = np.bincount(classes)[classes]
    tight = room[counts > room]
    return max(1, int(tight.min()) // 2) if len(tight) else len(classes)


def floor_bytes(
    layouts: np.ndarray, sizes: np.ndarray, may_stream: np.ndarray, at_once: np.ndarray
) -> int:
    """The least that `plan` can work with."""
    found = _least(layouts, sizes, may_stream, at_once)
    return min(int(sizes.sum()), found.resident_bytes + found.least_bytes)


def _least(layouts, sizes, may_stream, at_once) -> Plan:
    classes = np.unique(layouts[may_stream])
    each, counts, least = np.empty((3, len(classes)), np.int64)
    for i, layout in enumerate(classes):
        mine = may_stream & (layouts == layout)
        each[i], counts[i] = int(sizes[mine][0]), int(mine.sum())
        least[i] = min(max(MIN_SLOTS, int(at_once[mine].max())), int(counts[i]))
    streamed = np.flatnonzero(may_stream).astype(np.uint32)
    return Plan(streamed, int(sizes[~may_stream].sum()), classes, each, counts, least)
