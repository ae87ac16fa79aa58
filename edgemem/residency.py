"""Which bundles are in DRAM, and where: some from open to close, the others in slots as needed.

The slab is taken once, at open: the resident bundles' pages one after another, then for each layout
class of streamed bundles its slots. The native residency (native/residency.c) owns the slots; this
is its face, and the place where its failures become exceptions.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from time import perf_counter

import numpy as np

from ._native import Slab, check, ffi, lib, pointer
from .errors import EdgeMemError, FlashError
from .store import Store, open_direct, read_error

DEPTHS = (4, 8)
"""Reads in flight that are tried while resident bundles are read; the knee serves from then on."""
DEPTH = 8
"""Reads in flight where there is too little to read for a trial."""
PIECE_BYTES = 512 << 10
_TRIAL_BYTES = 48 << 20
_TRIALS = 2
_KNEE = 0.95
"""A depth is enough that gives this share of the best rate."""


@dataclass(frozen=True)
class Slots:
    """How many bundles of one layout class may be in memory at once."""

    layout: int
    count: int


class Residency:
    """All bundles of a store but those that are `elsewhere`, or nowhere. `streamed` (uint32,
    ascending) are those that live in `slots`.

    `addresses` is uint64 [n_bundles], 0 for the streamed; `index_of` int64 [n_bundles] numbers the
    streamed from 0 and is -1 for the others; `sizes` int64 [n_bundles] are bytes in memory. The
    verbs take these numbers; `kinds`, `classes` (its layout class) and `room` (slots of that) are
    by these numbers too. `native` is the em_residency, NULL where nothing streams. Opening reads
    the resident bundles and checks them; `depth` reads in flight were best then, and `read_rate`
    bytes per second came (0: unknown).
    Raises MemoryError, CorruptError, FlashError.
    """

    def __init__(
        self, store: Store, streamed: np.ndarray, slots: list[Slots],
        progress: Callable[[int, int], None] | None = None, engine: str | None = None, faults=None,
        elsewhere: Sequence[int] = (),
    ):  # fmt: skip
        self._store, self._engine, self._faults = store, engine, faults
        self.sizes = store.entries["page_count"].astype(np.int64) * store.page_size
        self.streamed = np.asarray(streamed, np.uint32)
        self.index_of = np.full(len(self.sizes), -1, np.int64)
        self.index_of[self.streamed] = np.arange(len(self.streamed))
        self.kinds = store.entries["kind"][self.streamed]
        self.classes = store.entries["layout"][self.streamed].astype(np.int64)
        self.slots = {entry.layout: entry.count for entry in slots}
        self.room = self._room()
        self.depth, self.read_rate = DEPTH, 0.0
        self._again = dict.fromkeys(_COUNTERS, 0)
        self.resident = resident = np.setdiff1d(np.flatnonzero(self.index_of < 0), elsewhere)
        slot_sizes = [self._class_bytes(s.layout) for s in slots]
        total = int(self.sizes[resident].sum())
        total += sum(s.count * size for s, size in zip(slots, slot_sizes, strict=True))
        self._slab = Slab(total)
        self._fd, self.direct = open_direct(store.path)
        self.native = ffi.NULL
        # Reads in flight land in the slab: it must outlive the thread that waits for them.
        self._finalizer = weakref.finalize(self, _close, self._slab, self._fd, None)
        try:
            end = self._place_resident(resident)
            self._load_resident(resident, progress)
            if len(self.streamed):
                self._open_slots(end, slots, slot_sizes)
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        return self._slab.bytes

    @property
    def engine(self) -> str:
        """The I/O engine that reads streamed bundles, or "none"."""
        if not self.native:
            return "none"
        return ffi.string(lib.em_residency_engine(self.native)).decode()

    def acquire(self, indices: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Pin streamed bundles (uint32, contiguous), start reading the absent; addresses uint64.

        Never waits for a read: that is `wait`'s.
        """
        addresses = np.empty(len(indices), np.uint64)
        status = lib.em_residency_acquire(
            self.native, pointer(indices, "uint32_t *"), len(indices), pointer(ranks, "float *"),
            pointer(addresses, "uint64_t *"),
        )  # fmt: skip
        check(status, f"holding {len(indices)} bundles at once")
        return addresses

    def release(self, indices: np.ndarray) -> None:
        """Undo one `acquire` of the same bundles."""
        lib.em_residency_release(self.native, pointer(indices, "uint32_t *"), len(indices))

    def release_all(self) -> None:
        """Undo every `acquire`, after a step that was interrupted in the middle of one."""
        if self.native:
            lib.em_residency_release_all(self.native)

    def wait(self, indices: np.ndarray) -> None:
        """Wait until acquired bundles are there. Raises CorruptError or FlashError."""
        at = pointer(indices, "uint32_t *")
        if lib.em_residency_wait(self.native, at, len(indices)) != lib.EM_OK:
            raise self.error()

    def cancel(self, indices, n: int) -> None:
        """Forget prefetches that have not started. What was prefetched stays until it is acquired,
        but for these bundles (uint32 pointer), which nobody waits for any more."""
        lib.em_residency_cancel(self.native, indices, n)

    def clear(self) -> None:
        """Evict all that is not pinned: slots are as empty as after opening."""
        if self.native:
            lib.em_residency_clear(self.native)

    def resize(self, slots: dict[int, int], ranks: np.ndarray) -> None:
        """Change how many slots each layout class has, up to those at open. Nothing may be held.

        What leaves is what ranks lowest; its memory goes back to the system.
        """
        # All of them, whatever was believed: an interrupt may have cut the last change short.
        for place, layout in enumerate(self.slots):
            status = lib.em_residency_resize(
                self.native, place, slots[layout], pointer(ranks, "float *")
            )
            check(status, f"changing {self.slots[layout]} slots to {slots[layout]}")
            self.slots[layout] = slots[layout]
        self.room = self._room()

    def statistics(self) -> dict[str, int]:
        """Counters since open; see em_residency_stats."""
        counted = dict(self._again)
        if self.native:
            stats = lib.em_residency_statistics(self.native)
            counted = {name: int(getattr(stats, name)) + counted[name] for name in _COUNTERS}
        return counted

    def error(self) -> EdgeMemError:
        """The exception for the read that failed last."""
        if not self.native:
            return FlashError(f"reading {self._store.path}: it was closed")
        return self._error_of(self.native, self.streamed)

    def close(self) -> None:
        """Wait for reads in flight and let go of the file. Closing twice is fine."""
        self.native = ffi.NULL
        self._finalizer()

    def _class_bytes(self, layout: int) -> int:
        first = int(np.flatnonzero(self._store.entries["layout"] == layout)[0])
        return int(self.sizes[first])

    def _place_resident(self, resident: np.ndarray) -> int:
        ends = np.cumsum(self.sizes[resident])
        self.addresses = np.zeros(len(self.sizes), np.uint64)
        starts = ends - self.sizes[resident]
        self.addresses[resident] = self._slab.address + starts.astype(np.uint64)
        return self._slab.address + int(ends[-1] if len(ends) else 0)

    def load_again(self) -> None:
        """Read all that stays in memory once more, into its place. Raises as opening does."""
        started = perf_counter()
        self._load_resident(self.resident, None)
        spent = int((perf_counter() - started) * 1e6)
        size = int(self.sizes[self.resident].sum())
        for name, more in (("read_bytes", size), ("stall_us", spent), ("busy_us", spent)):
            self._again[name] += more

    def _load_resident(self, resident: np.ndarray, progress) -> None:
        """Through the same engine as everything else: direct, in large pieces, several at once.

        One part is always being read while the one before it is waited for.
        """
        classes = [(int(self.addresses[b]), int(self.sizes[b]), 1) for b in resident.tolist()]
        native = self._open(resident, range(len(resident)), classes, max(DEPTHS))
        sizes, parts = self.sizes[resident], _parts(self.sizes[resident])
        trial = _DepthTrial(len(parts))
        lib.em_residency_set_depth(native, trial.depth)
        done, total, started = 0, int(sizes.sum()), perf_counter()
        try:
            for part, following in zip_longest(parts, parts[1:]):
                if not done:
                    _start(native, part)
                if following is not None:
                    _start(native, following)
                if lib.em_residency_wait(native, *_ids(part)) == lib.EM_FLASH:
                    raise self._error_of(native, resident)
                done += int(sizes[part].sum())
                trial.part_ended(int(sizes[part].sum()))
                lib.em_residency_set_depth(native, trial.depth)
                if progress is not None:
                    progress(done, total)
        finally:
            lib.em_residency_close(native)
        self.depth = trial.depth
        if total >= _TRIAL_BYTES:
            self.read_rate = total / (perf_counter() - started)

    def _open_slots(self, start: int, slots: list[Slots], slot_sizes: list[int]) -> None:
        classes, place = [], {}
        for entry, size in zip(slots, slot_sizes, strict=True):
            place[entry.layout] = len(classes)
            classes.append((start, size, entry.count))
            start += size * entry.count
        layouts = self._store.entries["layout"][self.streamed].tolist()
        native = self._open(self.streamed, (place[l] for l in layouts), classes, self.depth)
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _close, self._slab, self._fd, native)
        self.native = native

    def _room(self) -> np.ndarray:
        """int64 [n_streamed]: the slots of each bundle's class."""
        counts = np.zeros(len(self._store.layouts), np.int64)
        for layout, count in self.slots.items():
            counts[layout] = count
        return counts[self.classes]

    def _open(self, ids: np.ndarray, class_of, classes, depth: int):
        entries, page = self._store.entries[ids], self._store.page_size
        bundles = ffi.new("em_bundle[]", len(ids))
        first = [_first_bytes(layout) for layout in self._store.layouts]
        rows = zip(
            (entries["page_first"] * page).tolist(), self.sizes[ids].tolist(),
            entries["payload_bytes"].tolist(), (first[i] for i in entries["layout"].tolist()),
            entries["crc32c"].tolist(), class_of, strict=True,
        )  # fmt: skip
        names = ("offset", "bytes", "payload_bytes", "first_bytes", "crc32c", "slot_class")
        for bundle, row in zip(bundles, rows, strict=True):
            for name, value in zip(names, row, strict=True):
                setattr(bundle, name, value)
        native_classes = ffi.new("em_slot_class[]", len(classes))
        for slot_class, (start, size, count) in zip(native_classes, classes, strict=True):
            slot_class.start = ffi.cast("void *", start)
            slot_class.slot_bytes, slot_class.n_slots = size, count
        out = ffi.new("em_residency **")
        name = ffi.NULL if self._engine is None else ffi.new("char[]", self._engine.encode())
        faults = ffi.NULL if self._faults is None else ffi.new("em_faults *", self._faults)
        status = lib.em_residency_open(
            self._fd, bundles, len(ids), native_classes, len(classes), name, depth, PIECE_BYTES,
            faults, out,
        )  # fmt: skip
        check(status, f"opening the I/O engine {self._engine or '(any)'}")
        return out[0]

    def _error_of(self, native, ids: np.ndarray) -> EdgeMemError:
        failure = lib.em_residency_failure(native)
        what = f"{self._store.describe(int(ids[failure.bundle]))} of {self._store.path}"
        return read_error(what, failure.error)


_COUNTERS = (
    "hits", "misses", "read_bytes", "reads", "demand_bytes", "prefetch_bytes", "useful_bytes",
    "wasted_bytes", "dropped_bytes", "stall_us", "busy_us", "idle_us",
)  # fmt: skip


def _close(slab: Slab, fd: int, native) -> None:
    if native is not None:
        lib.em_residency_close(native)
    os.close(fd)


class _DepthTrial:
    """Finds the knee of the device's curve: `depth` is what to use now, in the end the knee.

    Each depth has its turn a few times, as rates differ from moment to moment; its best counts.
    """

    def __init__(self, parts: int):
        trials = DEPTHS * _TRIALS if parts > len(DEPTHS) * _TRIALS else ()
        self._left = list(trials)
        self._rates = dict.fromkeys(DEPTHS, 0.0)
        self._since = perf_counter()
        self.depth = self._left[0] if trials else DEPTH

    def part_ended(self, size: int) -> None:
        """So many bytes were read since the last part ended."""
        now = perf_counter()
        rate, self._since = size / max(now - self._since, 1e-9), now
        if not self._left:
            return
        self._rates[self.depth] = max(self._rates[self.depth], rate)
        del self._left[0]
        best = max(self._rates.values())
        knee = min(d for d, found in self._rates.items() if found >= _KNEE * best)
        self.depth = self._left[0] if self._left else knee


def _parts(sizes: np.ndarray) -> list[np.ndarray]:
    """Bundles (uint32) one after another, in parts of about _TRIAL_BYTES."""
    numbers = (np.cumsum(sizes) - sizes) // _TRIAL_BYTES
    ids = np.arange(len(sizes), dtype=np.uint32)
    return [ids[numbers == number] for number in np.unique(numbers)]


def _ids(part: np.ndarray):
    return pointer(part, "uint32_t *"), len(part)


def _start(native, part: np.ndarray) -> None:
    addresses = np.empty(len(part), np.uint64)
    status = lib.em_residency_acquire(
        native, *_ids(part), ffi.NULL, pointer(addresses, "uint64_t *")
    )
    check(status, "reading resident bundles")


def _first_bytes(layout) -> int:
    """Bytes up to `down` where gate and up lie before it: they can be multiplied earlier."""
    if "down" not in layout:
        return 0
    start = layout["down"].offset
    before = [layout[name] for name in ("gate", "up", "gate_bias", "up_bias") if name in layout]
    return start if all(segment.offset < start for segment in before) else 0
