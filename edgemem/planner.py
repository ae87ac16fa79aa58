"""What stays in memory and what streams: sizes in, slots out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SLOTS = 2
"""One bundle being computed while the next one lands."""
MIN_ROWS = 64
"""Rows of a bundle that comes apart: reading so many at once keeps a device busy."""


@dataclass(frozen=True)
class Bundles:
    """What the planner knows of a store's bundles, each array by bundle.

    Their layout class, bytes in memory, whether they may stream, how many of their kind one token
    wants of a layer, and the share of tokens that want each. What streams comes apart into so many
    `rows`, each then a part of its own; 0 for what is read whole. `aside_bytes` is what rows that
    come and go take beside themselves.
    """

    layouts: np.ndarray
    sizes: np.ndarray
    may_stream: np.ndarray
    at_once: np.ndarray
    use: np.ndarray
    rows: np.ndarray
    aside_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """`streamed` are bundle ids (uint32, ascending), `apart` those of which rows come and go; all
    others, of `resident_bytes`, stay.

    Nothing streams where everything fits: then `streamed` is empty. `classes` are the layout
    classes of what streams; of each (arrays [n_classes]) `each` is a bundle's bytes, `counts` the
    bundles that there are, `least` the slots that a step cannot do without, and `demand` how many
    bundles a token wants. Of a class that comes apart these are a row of each of its bundles.
    """

    streamed: np.ndarray
    apart: np.ndarray
    resident_bytes: int
    classes: np.ndarray
    each: np.ndarray
    counts: np.ndarray
    least: np.ndarray
    demand: np.ndarray
    comes_apart: np.ndarray
    aside_bytes: int = 0

    @property
    def streams(self) -> bool:
        """Whether anything comes and goes."""
        return len(self.streamed) + len(self.apart) > 0

    @property
    def least_text(self) -> str:
        """For people: how few slots there are at least, and for how many bundles."""
        parts = []
        for what, those in (
            ("slots for {} bundles", ~self.comes_apart),
            ("of {} neurons a layer", self.comes_apart),
        ):
            if those.any():
                parts.append(f"{self.least[those].sum()} {what.format(self.counts[those].sum())}")
        return ", ".join(parts)

    @property
    def least_bytes(self) -> int:
        """Bytes of the slots that a step cannot do without."""
        return int(self.least @ self.each)

    def slots(self, room: int) -> dict[int, int]:
        """How many slots of each layout class `room` bytes hold: more where tokens want more.

        More room never gives a class fewer slots. Less than `least_bytes` counts as that.
        """
        low, high = 0.0, float((self.counts / np.maximum(self.demand, 1e-9)).max(initial=0))
        while high - low > 1e-3 * high + 1e-6:
            middle = (low + high) / 2
            fits = int(self._share(middle) @ self.each) <= room
            low, high = (middle, high) if fits else (low, middle)
        slots = self._share(high if int(self._share(high) @ self.each) <= room else low)
        return dict(zip(self.classes.tolist(), slots.tolist(), strict=True))

    def _share(self, tokens: float) -> np.ndarray:
        """Slots for what so many tokens want, beside the least."""
        more = np.floor(self.demand * tokens).astype(np.int64)
        return np.minimum(self.least + more, self.counts)


def plan(bundles: Bundles, room: int) -> Plan | None:
    """Share out `room` bytes: all bundles, or those that must be there and slots for the others.

    None if even one step's bundles do not fit.
    """
    if int(bundles.sizes.sum()) <= room:
        none, ids = np.empty(0, np.int64), np.empty(0, np.uint32)
        nothing = (none, none, none, none, none, none.astype(bool))
        return Plan(ids, ids, int(bundles.sizes.sum()), *nothing)
    found = _least(bundles)
    return found if len(found.classes) and _bytes(found) <= room else None


def round_size(classes: np.ndarray, room: np.ndarray) -> int:
    """How many of some bundles are held at once, by the layout class of each and its slots.

    This is what native/stream.c does, said once more for replays. All, or where they are more than
    the slots, in rounds half of those of the tightest class: the next round lands while one is
    computed.
    """
    if len(classes) <= room.min():
        return len(classes)
    counts = np.bincount(classes)[classes]
    tight = room[counts > room]
    return max(1, int(tight.min()) // 2) if len(tight) else len(classes)


def floor_bytes(bundles: Bundles) -> int:
    """The least that `plan` can work with."""
    found = _least(bundles)
    return min(int(bundles.sizes.sum()), _bytes(found))


def _bytes(plan: Plan) -> int:
    return plan.resident_bytes + plan.least_bytes + plan.aside_bytes


def _least(bundles: Bundles) -> Plan:
    may_stream, sizes = bundles.may_stream, bundles.sizes
    classes = np.unique(bundles.layouts[may_stream])
    each, counts, least = np.empty((3, len(classes)), np.int64)
    demand, comes_apart = np.empty(len(classes)), np.zeros(len(classes), bool)
    for i, layout in enumerate(classes):
        mine = may_stream & (bundles.layouts == layout)
        rows = int(bundles.rows[mine][0])
        if rows > 0:
            each[i], counts[i] = -(-int(sizes[mine].sum()) // rows), rows
            least[i], demand[i] = min(MIN_ROWS, rows), bundles.use[mine].max() * rows
            comes_apart[i] = True
            continue
        each[i], counts[i] = int(sizes[mine][0]), int(mine.sum())
        least[i] = min(max(MIN_SLOTS, int(bundles.at_once[mine].max())), int(counts[i]))
        demand[i] = bundles.use[mine].sum()
    whole, apart = (
        np.flatnonzero(may_stream & is_so).astype(np.uint32)
        for is_so in (bundles.rows == 0, bundles.rows > 0)
    )
    resident_bytes = int(sizes[~may_stream].sum())
    aside = bundles.aside_bytes if len(apart) else 0
    arrays = (classes, each, counts, least, demand, comes_apart)
    return Plan(whole, apart, resident_bytes, *arrays, aside)
