"""Rows of bundles that come apart, replayed: in the slots that a live run has, without bytes; and
in what LRU and Belady would make of the same room.

The rules are native/neurons.c's: rows are wanted as it is decided which are active, part by part. A
turn that wants more than there is room for takes rounds, and the set's next turn counts on that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgemem import belady, tracefile
from edgemem._native import ffi, lib, pointer
from edgemem.errors import StoreError
from edgemem.predictors.placement import part_ends

MOST_ROWS = 1 << 24
"""Of all sets of a trace."""


@dataclass(frozen=True)
class Rows:
    """Demand for rows in the order in which it came: event e is one turn of one of the `sets`.

    Event e takes rows ids[starts[e]:starts[e+1]], ascending, of its set, which has `counts` of
    them. Hits and `room` (of each set) are those of the run that was recorded; `resized` is what
    room there was before the first event of a step, in turn.
    """

    name: str
    counts: np.ndarray
    sets: np.ndarray
    steps: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    hits: np.ndarray
    room: np.ndarray
    resized: dict[int, list[np.ndarray]] = field(default_factory=dict)

    @property
    def bases(self) -> np.ndarray:
        """The number of each set's first row, where those of all sets are numbered in turn."""
        return np.cumsum(self.counts) - self.counts

    def events(self) -> Iterator[tuple[int, np.ndarray]]:
        """The set of each event, and the rows that it takes."""
        for event, of in enumerate(self.sets.tolist()):
            yield of, self.ids[self.starts[event] : self.starts[event + 1]]

    def rooms(self) -> np.ndarray:
        """The room that there was at each event, int64 [events, sets]."""
        found, now, resized = np.empty((len(self.sets), len(self.counts)), np.int64), self.room, 0
        changes = sorted(self.resized.items())
        for event, step in enumerate(self.steps.tolist()):
            while resized < len(changes) and changes[resized][0] <= step:
                now, resized = changes[resized][1][-1], resized + 1
            found[event] = now
        return found

    def room_of(self, share: float) -> np.ndarray:
        """Room for this share of each set's rows, and for one at least."""
        return np.maximum(1, (share * self.counts).astype(np.int64))

    def hit_rate(self, hits: np.ndarray, first_step: int = 0) -> float:
        """Share of demand that was hit from `first_step` on."""
        events = self.steps >= first_step
        return float(hits[events].sum() / max(1, np.diff(self.starts)[events].sum()))


# --- Reading --------------------------------------------------------------------------------------


def read(path: Path) -> Rows | None:
    """What a file that `--trace` wrote says of rows, or None. Raises StoreError."""
    if path.name.endswith(".csv.xz"):
        return None
    header, steps = tracefile.read(path)
    try:
        counts = _whole(header.row_counts)
        if not len(counts):
            return None
        fits = counts.min() >= 1 and counts.max() <= MOST_ROWS and counts.sum() <= MOST_ROWS
        _check(fits, f"sets of {header.row_counts} rows")
        return _read(path.stem, counts, _room(header.room, counts), steps)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(f"reading {path}: what it says of rows is wrong: {error}") from error


def _read(name: str, counts: np.ndarray, room: np.ndarray, lines: Iterator[dict]) -> Rows | None:
    sets, steps, ids, hits, resized = [], [], [], [], {}
    for step, line in enumerate(lines):
        rows = line.get("rows", {})
        if rows.get("resized"):
            resized[step] = [_room(now, counts) for now in rows["resized"]]
        for of, packed, found in zip(
            rows.get("sets", ()), rows.get("ids", ()), rows.get("hits", ()), strict=True
        ):
            _check(0 <= of < len(counts), f"step {step} has a set {of}")
            sets.append(of)
            steps.append(step)
            ids.append(tracefile.unpack(packed, int(counts[of])).astype(np.int32))
            hits.append(found)
    if not sets:
        return None
    return Rows(
        name, counts, _whole(sets), _whole(steps), np.cumsum([0, *map(len, ids)]),
        np.concatenate(ids), _whole(hits), room, resized,
    )  # fmt: skip


def _whole(values) -> np.ndarray:
    found = np.array(values)
    _check(found.ndim == 1 and (found.dtype.kind in "iu" or not len(found)), "numbers are missing")
    return found.astype(np.int64)


def _room(values, counts: np.ndarray) -> np.ndarray:
    room = _whole(values)
    fits = room.shape == counts.shape and bool(((1 <= room) & (room <= counts)).all())
    _check(fits, f"room for {values} of {counts.tolist()} rows")
    return room


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


# --- Caches ---------------------------------------------------------------------------------------


class Slots:
    """One set in the slots of native/row_slots.c, which take turns as native/neurons.c does."""

    def __init__(self, count: int, room: int):
        native = lib.em_row_slots_open(count, room, count)
        if native == ffi.NULL:
            raise MemoryError(f"slots for {count} rows")
        self._native, self._room = ffi.gc(native, lib.em_row_slots_close), room
        self._ends = part_ends(count)
        self._absent = np.empty(count, np.int32)
        self._crowded = False

    def resize(self, room: int) -> None:
        """Give room to so many rows."""
        lib.em_row_slots_resize(self._native, room)
        self._room = room

    def turn(self, ids: np.ndarray) -> int:
        """Take rows (int32, ascending); returns how many of them were there."""
        hits = wanted = 0
        lib.em_row_slots_begin(self._native)
        for end in [] if self._crowded else np.searchsorted(ids, self._ends).tolist():
            if end > self._room:
                break
            hits += self._want(ids[wanted:end])
            wanted = end
        self._crowded = len(ids) > self._room
        return hits + self._rounds(ids[wanted:])

    def _rounds(self, ids: np.ndarray) -> int:
        if not len(ids):
            return 0
        hits = first = 0
        lib.em_row_slots_keep(self._native, *_pointed(ids))
        while first < len(ids):
            end = first + lib.em_row_slots_fit(self._native, *_pointed(ids[first:]))
            lib.em_row_slots_begin(self._native)
            hits += self._want(ids[first:end])
            first = end
        lib.em_row_slots_keep(self._native, ffi.NULL, 0)
        return hits

    def _want(self, ids: np.ndarray) -> int:
        absent = pointer(self._absent, "int32_t *")
        return len(ids) - lib.em_row_slots_want(self._native, *_pointed(ids), absent)


def _pointed(ids: np.ndarray):
    return pointer(ids, "int32_t *"), len(ids)


def hits_of(
    rows: Rows, room: np.ndarray, resized: dict[int, list[np.ndarray]] | None = None
) -> np.ndarray:
    """Hits of each event, int64 [events], in slots that are empty at first."""
    sets = [Slots(*of) for of in zip(rows.counts.tolist(), room.tolist(), strict=True)]
    hits, changes = np.empty(len(rows.sets), np.int64), sorted((resized or {}).items())
    for event, (of, ids) in enumerate(rows.events()):
        while changes and changes[0][0] <= rows.steps[event]:
            for now in changes.pop(0)[1]:
                for slots, most in zip(sets, now.tolist(), strict=True):
                    slots.resize(most)
        hits[event] = sets[of].turn(ids)
    return hits


def lru(rows: Rows, room: np.ndarray) -> np.ndarray:
    """Likewise where what was used last of all stays, in rounds of as much as there is room for."""
    last = np.full(int(rows.counts.sum()), -1, np.int64)
    held, clock = [np.empty(0, np.int64)] * len(rows.counts), 0
    hits, bases = np.zeros(len(rows.sets), np.int64), rows.bases
    for event, (of, ids) in enumerate(rows.events()):
        wanted, most = bases[of] + ids, int(room[of])
        for first in range(0, len(wanted), most):
            part = wanted[first : first + most]
            hits[event] += np.isin(part, held[of], assume_unique=True).sum()
            last[part] = np.arange(clock, clock + len(part))
            clock += len(part)
            there = np.union1d(held[of], part)
            if len(there) > most:
                there = there[np.argpartition(-last[there], most)[:most]]
            held[of] = there
    return hits


def best(rows: Rows, rooms: np.ndarray) -> np.ndarray:
    """Likewise where the future is known; `rooms` int64 [events, sets]."""
    ids = np.repeat(rows.bases[rows.sets], np.diff(rows.starts)) + rows.ids
    set_of = np.repeat(np.arange(len(rows.counts)), rows.counts)
    found = belady.row_hits(rows.starts, ids, set_of, rooms)
    return np.diff(np.concatenate([[0], np.cumsum(found)])[rows.starts])


# --- Results --------------------------------------------------------------------------------------


def compare(rows: Rows, share: float) -> dict[str, float]:
    """Hit rates after the first third of the steps, with room for a share of each set."""
    room, first = rows.room_of(share), (int(rows.steps[-1]) + 1) // 3
    every = np.broadcast_to(room, (len(rows.sets), len(room)))
    found = {"heat": hits_of(rows, room), "lru": lru(rows, room), "belady": best(rows, every)}
    return {name: rows.hit_rate(hits, first) for name, hits in found.items()}


def show(rows: Rows, shares: list[float]) -> None:
    """Print one table row for each share of the rows."""
    for share in shares:
        rates = compare(rows, share)
        low, high = rates["lru"], rates["belady"]
        cells = [f"{rate:.3f}" for rate in rates.values()]
        cells.append(f"{(rates['heat'] - low) / (high - low):.0%}" if high - low > 0.01 else "–")
        print(f"| {rows.name} | {share:.0%} | " + " | ".join(cells) + " |")


def show_again(rows: Rows) -> None:
    """Print whether a replay finds the hits that the live run recorded."""
    hits = hits_of(rows, rows.room, rows.resized)
    print(
        f"{rows.name}: rows, room for {rows.room.sum()} of {rows.counts.sum()}: "
        f"hit rate {rows.hit_rate(hits):.4f} in replay, {rows.hit_rate(rows.hits):.4f} live, "
        f"{rows.hit_rate(best(rows, rows.rooms())):.4f} Belady's; "
        f"hits are equal in {(hits == rows.hits).sum()} of {len(hits)} turns"
    )
