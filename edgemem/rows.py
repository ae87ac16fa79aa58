"""Rows of a store's matrices that come and go one by one, such as neurons: which are in memory.

A bundle that is taken apart is never read whole. Each has a set of rows, of which those that were
used last stay (native/rows.c); what reads them makes no difference to what is computed.
"""

from __future__ import annotations

import os
import weakref

import numpy as np

from ._native import Slab, check, ffi, lib, pointer
from .demand import DemandLog
from .dtypes import group_bytes, round_up
from .errors import EdgeMemError
from .format import Kind, Segment
from .store import Store, open_direct, read_error

DEPTH = 128
"""Reads in flight: they are small (bench/LOG.md)."""
_PAGE, _HUGE_PAGE = 4096, 2 << 20


class RowCache:
    """Rows of the bundles `ids` (uint32), of which each has room for `room[layout class]`.

    Raises MemoryError, CorruptError, FlashError.
    """

    def __init__(
        self, store: Store, ids: np.ndarray, room: dict[int, int], engine: str | None = None,
        faults=None,
    ):  # fmt: skip
        self._store, self._ids = store, [int(i) for i in ids]
        self._layouts = [int(store.entries["layout"][i]) for i in self._ids]
        self._room = {layout: room[layout] for layout in set(self._layouts)}
        self._log: DemandLog | None = None
        self._rows = rows = [_rows_of(store, i) for i in self._ids]
        sizes, held = self.row_sizes, self.rooms
        spans = [round_up(n * size, _PAGE) for n, size in zip(held, sizes, strict=True)]
        self._slab = Slab(sum(spans))
        self._checksums = [_words(store, i, "checksums") for i in self._ids]
        self._places = [store.places(i) for i in self._ids]
        sets = ffi.new("em_row_set[]", len(self._ids))
        start = self._slab.address
        for i, item in enumerate(sets):
            first_page = int(store.entries["page_first"][self._ids[i]])
            item.offset = first_page * store.page_size + rows[i].offset
            item.row_bytes, item.n_rows = sizes[i], rows[i].rows
            item.checksums = pointer(self._checksums[i], "uint32_t *")
            if self._places[i] is not None:
                item.places = pointer(self._places[i], "uint32_t *")
            item.start = ffi.cast("void *", start)
            item.room = item.most_room = held[i]
            start += spans[i]
        fd, self.direct = open_direct(store.path)
        self._finalizer = weakref.finalize(self, os.close, fd)
        out = ffi.new("em_rows **")
        name = ffi.NULL if engine is None else ffi.new("char[]", engine.encode())
        misbehaviour = ffi.NULL if faults is None else ffi.new("em_faults *", faults)
        status = lib.em_rows_open(fd, sets, len(sets), name, DEPTH, misbehaviour, out)
        check(status, f"opening the I/O engine {engine or '(any)'}")
        self.native = out[0]
        self._finalizer.detach()
        # Reads land in the slab, and are checked against the checksums.
        kept = (self._slab, self._checksums, self._places)
        self._finalizer = weakref.finalize(self, _close, self.native, fd, kept)

    @property
    def bytes(self) -> int:
        return self._slab.bytes

    @property
    def engine(self) -> str:
        """The I/O engine that reads rows."""
        return ffi.string(lib.em_rows_engine(self.native)).decode()

    @property
    def rooms(self) -> tuple[int, ...]:
        """How many rows each set may hold."""
        return tuple(self._room[layout] for layout in self._layouts)

    @property
    def row_counts(self) -> list[int]:
        """How many rows each set has."""
        return [segment.rows for segment in self._rows]

    @property
    def row_sizes(self) -> list[int]:
        """Bytes of a row of each set."""
        return [_row_bytes(segment) for segment in self._rows]

    def set_of(self, bundle: int) -> int:
        """The number of a bundle's set. Raises ValueError for others."""
        return self._ids.index(bundle)

    def resize(self, room: dict[int, int]) -> None:
        """Change how many rows the sets of each layout class may hold, up to those at open."""
        for i, layout in enumerate(self._layouts):
            check(lib.em_rows_resize(self.native, i, room[layout]), "changing room for rows")
            self._room[layout] = room[layout]
        if self._log is not None:
            self._log.resized.append((self._log.n_turns, self.rooms))

    def read_in(self, parts: int) -> None:
        """Let each of so many parts of a row be read by itself, as if they were not bundled."""
        lib.em_rows_read_in(self.native, parts)

    def clear(self) -> None:
        """Let all rows leave."""
        if self.native:
            lib.em_rows_clear(self.native)

    def take(self, number: int, ids: np.ndarray) -> None:
        """Read what is absent of rows `ids` (int32, ascending) of a set, no more than its room.
        Raises CorruptError or FlashError."""
        at, waited = np.empty(len(ids), np.uint64), ffi.new("int64_t *")
        status = lib.em_rows_take(
            self.native, number, pointer(ids, "int32_t *"), len(ids),
            ffi.cast("uint8_t const **", pointer(at, "uint64_t *")), waited,
        )  # fmt: skip
        if status == lib.EM_FLASH:
            raise self.error()
        check(status, "taking rows")

    def write_down(self, rows_room: int, turns_room: int) -> DemandLog:
        """A log of the rows that are taken from now on, numbered set after set."""
        self._log = DemandLog(rows_room, turns_room, self.rooms)
        lib.em_rows_log(self.native, self._log.native)
        return self._log

    def record(self, tell, user) -> None:
        """Tell native function `tell` (an em_observer; NULL: nobody) of each turn, with `user`."""
        if self.native:
            lib.em_rows_record(self.native, tell, user)

    def end_recording(self) -> None:
        """Let go of the log."""
        if self.native:
            lib.em_rows_log(self.native, ffi.NULL)
        self._log = None

    def statistics(self) -> dict[str, int]:
        """Counters since open; see em_row_stats."""
        if not self.native:
            return {}
        stats = lib.em_rows_statistics(self.native)
        return {name: int(getattr(stats, name)) for name in _COUNTERS}

    def error(self) -> EdgeMemError | None:
        """The exception for the row that could not be read; None if the last take went well."""
        failure = lib.em_rows_failure(self.native) if self.native else None
        if failure is None or not failure.failed:
            return None
        bundle = self._store.describe(self._ids[failure.set])
        what = f"neuron {failure.row} of {bundle} of {self._store.path}"
        return read_error(what, failure.error)

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        self.end_recording()
        self.native = ffi.NULL
        self._finalizer()


_COUNTERS = ("hits", "misses", "read_bytes", "reads", "busy_us", "stall_us")


def _close(native, fd: int, kept) -> None:
    lib.em_rows_close(native)
    os.close(fd)


def _rows_of(store: Store, bundle: int) -> Segment:
    return store.layout_of(bundle)["neurons"]


def _row_bytes(segment: Segment) -> int:
    return group_bytes(segment.dtype, segment.cols, segment.lanes)


def _words(store: Store, bundle: int, name: str) -> np.ndarray:
    segment = store.layout_of(bundle)[name]
    return np.frombuffer(store.read_segment(bundle, segment), "<u4")[: segment.cols]


def overhead_bytes(store: Store) -> int:
    """What a RowCache of all that comes apart takes beside rows: tables, buffers for reads, and of
    the last huge page of each large set what is beyond its room, about half."""
    rows = [_rows_of(store, int(i)) for i in np.flatnonzero(store.entries["kind"] == Kind.NEURONS)]
    if not rows:
        return 0
    stage = max(lib.em_row_stage_bytes(_row_bytes(segment)) for segment in rows)
    beyond = sum(segment.bytes > _HUGE_PAGE for segment in rows) * _HUGE_PAGE // 2
    return 2 * DEPTH * stage + 28 * sum(segment.rows for segment in rows) + beyond
