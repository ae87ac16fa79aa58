"""How fast a loaded engine's memory and flash can be read, with nothing done about what is read."""

from __future__ import annotations

import random
import statistics
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .engine import Engine
    from .residency import Residency

FLASH_SECONDS = 1.0
DRAM_SECONDS, DRAM_BYTES = 0.1, 1 << 30
"""Plain reads go over as many resident bytes, for as long in each of five runs."""


def resident_weights(engine: Engine) -> tuple[int, int]:
    """Where the resident weights lie, one after another: address and bytes."""
    residency = engine._streamer._residency
    resident = residency.resident
    return int(residency.addresses[resident].min()), int(residency.sizes[resident].sum())


def dram_rate(engine: Engine) -> float:
    """Bytes per second at which all threads read the resident weights and do nothing with them."""
    start, size = resident_weights(engine)
    size, rates = min(size, DRAM_BYTES), []
    engine._core.read_bytes(start, size)
    for _ in range(5):
        started, done = perf_counter(), 0
        while perf_counter() - started < DRAM_SECONDS:
            engine._core.read_bytes(start, size)
            done += size
        rates.append(done / (perf_counter() - started))
    return statistics.median(rates)


def flash_rate(engine: Engine, seconds: float = FLASH_SECONDS) -> tuple[int, float]:
    """Read streamed bundles in random order, flat out: their size, and bytes per second.

    Of the layout class that has most of the bytes; the slots are empty afterwards.
    """
    residency, classes = engine._streamer._residency, layout_classes(engine)
    sizes = residency.sizes[residency.streamed]
    largest = int(np.bincount(classes, sizes).argmax())
    slots, ids = engine._streamer.slots[largest], np.flatnonzero(classes == largest).tolist()
    random.Random(0).shuffle(ids)
    ids = np.array(ids, np.uint32)
    size = max(1, slots // 2)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    # What was read first leaves first: in a cycle longer than the slots, that never hits.
    ranks, held, turn = np.zeros(len(sizes), np.float32), [], 0
    residency.clear()
    before, started = residency.statistics()["read_bytes"], perf_counter()
    try:
        while perf_counter() - started < seconds and (turn < len(parts) or len(ids) > slots):
            part = parts[turn % len(parts)]
            turn += 1
            ranks[part] = turn
            residency.acquire(part, ranks)
            held.append(part)
            if len(held) == 2:
                _finish(residency, held)
        while held:
            _finish(residency, held)
        elapsed = perf_counter() - started
    finally:
        for part in held:
            residency.release(part)
    read = residency.statistics()["read_bytes"] - before
    engine.clear()
    return int(sizes[ids[0]]), read / elapsed


def row_rate(engine: Engine, share: float, seconds: float = FLASH_SECONDS) -> float:
    """Bytes per second of rows that are read in random order, none of them there before: that share
    of a set, since the denser they lie the fewer reads they take, and as many at once as fit. No
    rows are held afterwards."""
    rows, draw = engine._streamer.rows, random.Random(0)
    done, busy = 0, 0.0
    while busy < seconds:
        for number, (count, room) in enumerate(zip(rows.row_counts, rows.rooms, strict=True)):
            ids = np.array(sorted(draw.sample(range(count), max(1, int(share * count)))), np.int32)
            rows.clear()
            started = perf_counter()
            for first in range(0, len(ids), room):
                rows.take(number, ids[first : first + room])
            busy += perf_counter() - started
            done += len(ids) * rows.row_sizes[number]
            if busy >= seconds:
                break
    engine.clear()
    return done / busy


def _finish(residency: Residency, held: list[np.ndarray]) -> None:
    residency.wait(held[0])
    residency.release(held.pop(0))


def layout_classes(engine: Engine) -> np.ndarray:
    """The layout class of each streamed bundle, as `Streamer.slots` counts classes."""
    residency = engine._streamer._residency
    return np.searchsorted(list(residency.slots), residency.classes)
