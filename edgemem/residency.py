"""Which bundles are in DRAM, and where: some from open to close, the others in slots as needed.

The slab is taken once, at open: the resident bundles' pages one after another, then for each layout
class of streamed bundles its slots. The native residency (native/residency.c) owns the slots; this
is its face, and the place where its failures become exceptions.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ._native import Slab, check, ffi, lib, pointer
from .errors import CorruptError, EdgeMemError, FlashError
from .store import Store

DEPTH = 8
"""Reads in flight: the knee of most flash devices lies at 2 to 8 reads of PIECE_BYTES."""
PIECE_BYTES = 512 << 10
_BATCH = 64


@dataclass(frozen=True)
class Slots:
    """How many bundles of one layout class may be in memory at once."""

    layout: int
    count: int


class Residency:
    """All bundles of a store. `streamed` (uint32, ascending) are those that live in `slots`.

    `addresses` is uint64 [n_bundles], 0 for the streamed; `index_of` int64 [n_bundles] numbers the
    streamed from 0 and is -1 for the others; `sizes` int64 [n_bundles] are bytes in memory. The
    verbs take these numbers; `kinds` and `room` (slots of its class) are by these numbers too.
    Opening reads the resident bundles and checks them.
    Raises MemoryError, CorruptError, FlashError.
    """

    def __init__(
        self, store: Store, streamed: np.ndarray, slots: list[Slots],
        progress: Callable[[int, int], None] | None = None, engine: str | None = None, faults=None,
    ):  # fmt: skip
        self._store, self._engine, self._faults = store, engine, faults
        self.sizes = store.entries["page_count"].astype(np.int64) * store.page_size
        self.streamed = np.asarray(streamed, np.uint32)
        self.index_of = np.full(len(self.sizes), -1, np.int64)
        self.index_of[self.streamed] = np.arange(len(self.streamed))
        self.kinds = store.entries["kind"][self.streamed]
        self.room = _room(store, self.streamed, slots)
        self.slots = slots
        resident = np.flatnonzero(self.index_of < 0)
        slot_sizes = [self._class_bytes(s.layout) for s in slots]
        total = int(self.sizes[resident].sum())
        total += sum(s.count * size for s, size in zip(slots, slot_sizes, strict=True))
        self._slab = Slab(total)
        self._fd, self.direct = _open_direct(store.path)
        self._native = None
        # Reads in flight land in the slab: it must outlive the thread that waits for them.
        self._finalizer = weakref.finalize(self, _close, self._slab, self._fd, None)
        try:
            end = self._place_resident(resident)
            self._load_resident(resident, progress)
            if len(self.streamed):
                self._open_slots(end, slot_sizes)
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        return self._slab.bytes

    @property
    def engine(self) -> str:
        """The I/O engine that reads streamed bundles, or "none"."""
        if not self._native:
            return "none"
        return ffi.string(lib.em_residency_engine(self._native)).decode()

    def acquire(self, indices: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Pin streamed bundles (uint32, contiguous), start reading the absent; addresses uint64.

        Never waits for a read: `ready` tells when bytes are there.
        """
        addresses = np.empty(len(indices), np.uint64)
        status = lib.em_residency_acquire(
            self._native, pointer(indices, "uint32_t *"), len(indices), pointer(ranks, "float *"),
            pointer(addresses, "uint64_t *"),
        )  # fmt: skip
        check(status, f"holding {len(indices)} bundles at once")
        return addresses

    def release(self, indices: np.ndarray) -> None:
        """Undo one `acquire` of the same bundles."""
        lib.em_residency_release(self._native, pointer(indices, "uint32_t *"), len(indices))

    def release_all(self) -> None:
        """Undo every `acquire`, after a step that was interrupted in the middle of one."""
        if self._native:
            lib.em_residency_release_all(self._native)

    def wait(self, indices: np.ndarray) -> None:
        """Wait until acquired bundles are there. Raises the `error` of a read that failed."""
        at = pointer(indices, "uint32_t *")
        if lib.em_residency_wait(self._native, at, len(indices)) == lib.EM_FLASH:
            raise self.error()

    def clear(self) -> None:
        """Evict all that is not pinned: slots are as empty as after opening."""
        if self._native:
            lib.em_residency_clear(self._native)

    def prefetch(self, indices: np.ndarray, ranks: np.ndarray) -> int:
        """Start reading absent bundles behind all demand; returns how many."""
        return lib.em_residency_prefetch(
            self._native, pointer(indices, "uint32_t *"), len(indices), pointer(ranks, "float *")
        )

    @property
    def ready(self):
        """int32 pointer: a flag for each streamed bundle, 1 once its bytes are in place."""
        return lib.em_residency_ready(self._native)

    def statistics(self) -> dict[str, int]:
        """Counters since open; see em_residency_stats."""
        if not self._native:
            return {}
        stats = lib.em_residency_statistics(self._native)
        return {name: int(getattr(stats, name)) for name in _COUNTERS}

    def error(self) -> EdgeMemError:
        """The exception for the read that failed last."""
        return self._error_of(self._native, self.streamed)

    def close(self) -> None:
        """Wait for reads in flight and let go of the file. Closing twice is fine."""
        self._native = None
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

    def _load_resident(self, resident: np.ndarray, progress) -> None:
        """Through the same engine as everything else: direct, in large pieces, several at once."""
        classes = [(int(self.addresses[b]), int(self.sizes[b]), 1) for b in resident.tolist()]
        native = self._open(resident, range(len(resident)), classes)
        ids, done = np.arange(len(resident), dtype=np.uint32), 0
        addresses = np.empty(_BATCH, np.uint64)
        try:
            for start in range(0, len(ids), _BATCH):
                batch = ids[start : start + _BATCH]
                at = pointer(batch, "uint32_t *")
                status = lib.em_residency_acquire(
                    native, at, len(batch), ffi.NULL, pointer(addresses, "uint64_t *")
                )
                check(status, "reading resident bundles")
                if lib.em_residency_wait(native, at, len(batch)) == lib.EM_FLASH:
                    raise self._error_of(native, resident)
                done += int(self.sizes[resident[start : start + _BATCH]].sum())
                if progress is not None:
                    progress(done, int(self.sizes[resident].sum()))
        finally:
            lib.em_residency_close(native)

    def _open_slots(self, start: int, slot_sizes: list[int]) -> None:
        classes, place = [], {}
        for slots, size in zip(self.slots, slot_sizes, strict=True):
            place[slots.layout] = len(classes)
            classes.append((start, size, slots.count))
            start += size * slots.count
        layouts = self._store.entries["layout"][self.streamed].tolist()
        native = self._open(self.streamed, (place[l] for l in layouts), classes)
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _close, self._slab, self._fd, native)
        self._native = native

    def _open(self, ids: np.ndarray, class_of, classes):
        entries, page = self._store.entries[ids], self._store.page_size
        bundles = ffi.new("em_bundle[]", len(ids))
        rows = zip(
            (entries["page_first"] * page).tolist(), self.sizes[ids].tolist(),
            entries["payload_bytes"].tolist(), entries["crc32c"].tolist(), class_of, strict=True,
        )  # fmt: skip
        for bundle, row in zip(bundles, rows, strict=True):
            bundle.offset, bundle.bytes, bundle.payload_bytes, bundle.crc32c, bundle.slot_class = (
                row
            )
        native_classes = ffi.new("em_slot_class[]", len(classes))
        for slot_class, (start, size, count) in zip(native_classes, classes, strict=True):
            slot_class.start = ffi.cast("void *", start)
            slot_class.slot_bytes, slot_class.n_slots = size, count
        out = ffi.new("em_residency **")
        name = ffi.NULL if self._engine is None else ffi.new("char[]", self._engine.encode())
        faults = ffi.NULL if self._faults is None else ffi.new("em_faults *", self._faults)
        status = lib.em_residency_open(
            self._fd, bundles, len(ids), native_classes, len(classes), name, DEPTH, PIECE_BYTES,
            faults, out,
        )  # fmt: skip
        check(status, f"opening the I/O engine {self._engine or '(any)'}")
        return out[0]

    def _error_of(self, native, ids: np.ndarray) -> EdgeMemError:
        failure = lib.em_residency_failure(native)
        what = f"reading {self._store.describe(int(ids[failure.bundle]))} of {self._store.path}"
        if failure.error == 0:
            return CorruptError(f"{what}: its checksum is wrong; copy or convert the store again")
        if failure.error == errno.ENODATA:
            return CorruptError(f"{what}: the file ends before it; copy or convert the store again")
        return FlashError(f"{what}: {os.strerror(failure.error)}; check the device")


_COUNTERS = (
    "hits", "misses", "read_bytes", "reads", "demand_bytes", "prefetch_bytes", "useful_bytes",
    "wasted_bytes", "dropped_bytes", "stall_us", "busy_us",
)  # fmt: skip


def _close(slab: Slab, fd: int, native) -> None:
    if native is not None:
        lib.em_residency_close(native)
    os.close(fd)


def _room(store: Store, streamed: np.ndarray, slots: list[Slots]) -> np.ndarray:
    """int64 [n_streamed]: the slots of each bundle's class."""
    counts = np.zeros(len(store.layouts), np.int64)
    for entry in slots:
        counts[entry.layout] = entry.count
    return counts[store.entries["layout"][streamed]]


def _open_direct(path) -> tuple[int, bool]:
    """A descriptor that bypasses the page cache where a read proves that it works, and whether."""
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            fd = os.open(path, os.O_RDONLY | flag | os.O_CLOEXEC)
        except OSError:
            fd = -1
        if fd >= 0:
            try:
                if os.preadv(fd, [mmap.mmap(-1, 4096)], 0) == 4096:
                    return fd, True
            except OSError:
                pass
            os.close(fd)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    except OSError as error:
        raise FlashError(f"opening {path}: {error.strerror}; check the device") from error
