"""Records a live trace: what each streamed layer of each step demanded, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .store import Store
from .tracefile import TraceHeader, TraceWriter

if TYPE_CHECKING:
    from .residency import Slots


def header(store: Store, streamed: np.ndarray, slots: Sequence[Slots], policy: str) -> TraceHeader:
    """The first line of a trace of a run in which bundles `streamed` (uint32) live in `slots`."""
    entries = store.entries[streamed]
    place = {s.layout: i for i, s in enumerate(slots)}
    return TraceHeader(
        model=store.spec.model_type, policy=policy, n_layers=store.spec.n_layers,
        layer_of=tuple(entries["layer"].tolist()),
        class_of=tuple(place[layout] for layout in entries["layout"].tolist()),
        slots=tuple(s.count for s in slots),
    )  # fmt: skip


class Recorder:
    """What a streamer tells of each layer, with what counters did meanwhile, written to a trace.

    `statistics()` are the counters of em_residency_stats, `slots()` how many there are now of each
    layout class.
    """

    def __init__(
        self, writer: TraceWriter, statistics: Callable[[], dict[str, int]],
        slots: Callable[[], tuple[int, ...]],
    ):  # fmt: skip
        self._writer, self._statistics, self._slots = writer, statistics, slots
        self._then = statistics()

    def demand(self, layer: int, indices: np.ndarray, uses: np.ndarray | None = None) -> None:
        """A layer is over that demanded these streamed bundles, in all its rounds."""
        now, then = self._statistics(), self._then
        self._then = now
        self._writer.demand(
            layer, indices, uses, hits=now["hits"] - then["hits"],
            bytes=now["demand_bytes"] - then["demand_bytes"],
            stall_us=now["stall_us"] - then["stall_us"],
            prefetch_useful_bytes=now["useful_bytes"] - then["useful_bytes"],
            prefetch_wasted_bytes=now["wasted_bytes"] - then["wasted_bytes"],
        )  # fmt: skip

    def step(self, phase: str, tokens: int) -> None:
        """A step is over."""
        self._writer.step(phase, tokens, self._slots())

    def drop(self) -> None:
        """Forget a step that was interrupted or failed."""
        self._writer.drop()
        self._then = self._statistics()

    def close(self) -> None:
        """End the trace."""
        self._writer.close()
