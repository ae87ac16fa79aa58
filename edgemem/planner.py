"""What stays in memory and what streams: sizes in, slots out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SLOTS = 2
"""One bundle being computed while the next one lands."""


@dataclass(frozen=True)
class Plan:
    """`streamed` are bundle ids (uint32, ascending), `slots` is how many of each layout class fit.

    `resident_bytes` are of all other bundles, `slab_bytes` of the slots. Nothing streams where
    everything fits: then `streamed` is empty.
    """

    streamed: np.ndarray
    slots: dict[int, int]
    resident_bytes: int
    slab_bytes: int


def plan(
    layouts: np.ndarray, sizes: np.ndarray, may_stream: np.ndarray, at_once: np.ndarray, room: int
) -> Plan | None:
    """Share out `room` bytes: all bundles, or those that must be there and slots for the others.

    For each bundle: its layout class, its bytes, whether it may stream, and how many of its class
    one step wants at once. Room is shared between classes by their bytes. None if even one step's
    bundles do not fit.
    """
    if int(sizes.sum()) <= room:
        return Plan(np.empty(0, np.uint32), {}, int(sizes.sum()), 0)
    resident = int(sizes[~may_stream].sum())
    classes = np.unique(layouts[may_stream])
    totals = np.array([int(sizes[may_stream & (layouts == c)].sum()) for c in classes], np.int64)
    counts = np.array([int((may_stream & (layouts == c)).sum()) for c in classes], np.int64)
    least = [max(MIN_SLOTS, int(at_once[may_stream & (layouts == c)].max())) for c in classes]
    least = np.minimum(np.array(least, np.int64), counts)
    each = totals // np.maximum(counts, 1)
    spare = room - resident - int(least @ each)
    if spare < 0 or not len(classes):
        return None
    shares = [spare * int(total) // int(totals.sum()) for total in totals]
    slots = np.minimum(least + np.array(shares, np.int64) // each, counts)
    for i in np.argsort(each):  # what rounding and full classes leave over, small slots first
        left = room - resident - int(slots @ each)
        slots[i] = min(int(counts[i]), int(slots[i]) + left // int(each[i]))
    streamed = np.flatnonzero(may_stream).astype(np.uint32)
    by_class = dict(zip(classes.tolist(), slots.tolist(), strict=True))
    return Plan(streamed, by_class, resident, int(slots @ each))


def round_size(n_bundles: int, slots: int) -> int:
    """How many of a layer's bundles are held at once where `slots` are there for them: all, or in
    rounds half of the slots, so that the next round lands while one is computed."""
    return n_bundles if n_bundles <= slots else max(1, slots // 2)


def floor_bytes(
    layouts: np.ndarray, sizes: np.ndarray, may_stream: np.ndarray, at_once: np.ndarray
) -> int:
    """The least that `plan` can work with."""
    whole = int(sizes.sum())
    least = int(sizes[~may_stream].sum())
    for c in np.unique(layouts[may_stream]):
        mine = may_stream & (layouts == c)
        need = min(max(MIN_SLOTS, int(at_once[mine].max())), int(mine.sum()))
        least += need * int(sizes[mine][0])
    return min(whole, least)
