"""Records a live trace: what each streamed turn of each step demanded, and what came of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .format import Kind
from .store import Store
from .tracefile import TraceHeader, TraceWriter


def header(
    store: Store, streamed: np.ndarray, apart: np.ndarray, turns: np.ndarray, slots: dict[int, int],
    policy: str, lookahead: bool,
) -> TraceHeader:  # fmt: skip
    """The first line of a trace of a run in which bundles `streamed` (uint32) live in `slots`, and
    rows of those that come `apart`.

    `turns` int64 [n_bundles] as for a Streamer.
    """
    entries, layouts = store.entries[streamed], store.entries["layout"]
    held = {layout: slots[layout] for layout in np.unique(entries["layout"]).tolist()}
    place = {layout: i for i, layout in enumerate(held)}
    class_of = np.array([place[layout] for layout in entries["layout"].tolist()], np.int64)
    certain = np.isin(entries["kind"], (Kind.FFN, Kind.HEAD))
    return TraceHeader(
        model=store.spec.model_type, policy=policy, n_layers=store.spec.n_layers + 2,
        layer_of=tuple(turns[streamed].tolist()), class_of=tuple(class_of.tolist()),
        slots=tuple(held.values()),
        read_ahead=tuple(range(len(held)) if lookahead else np.unique(class_of[certain]).tolist()),
        row_layers=tuple(turns[apart].tolist()),
        row_counts=tuple(store.layout_of(i)["neurons"].rows for i in apart.tolist()),
        room=tuple(slots[layout] for layout in layouts[apart].tolist()),
    )  # fmt: skip


class Recorder:
    """What a streamer tells of each turn, with what counters did meanwhile, written to a trace.

    `statistics()` are the counters of em_residency_stats, `of_rows()` those of em_row_stats.
    """

    def __init__(
        self, writer: TraceWriter, statistics: Callable[[], dict[str, int]],
        of_rows: Callable[[], dict[str, int]] = dict,
    ):  # fmt: skip
        self._writer, self._statistics, self._of_rows = writer, statistics, of_rows
        self._then, self._rows_then = statistics(), of_rows()

    def demand(self, turn: int, indices: np.ndarray, uses: np.ndarray | None = None) -> None:
        """A turn is over that demanded these streamed bundles, in all its rounds."""
        now, then = self._statistics(), self._then
        self._then = now
        self._writer.demand(
            turn, indices, uses, hits=now["hits"] - then["hits"],
            bytes=now["demand_bytes"] - then["demand_bytes"],
            stall_us=now["stall_us"] - then["stall_us"],
            prefetch_useful_bytes=now["useful_bytes"] - then["useful_bytes"],
            prefetch_wasted_bytes=now["wasted_bytes"] - then["wasted_bytes"],
        )  # fmt: skip

    def rows(self, number: int, ids: np.ndarray) -> None:
        """A turn is over that took these rows of a set, in all its rounds."""
        now, then = self._of_rows(), self._rows_then
        self._rows_then = now
        self._writer.rows(
            number, ids, hits=now["hits"] - then["hits"],
            bytes=now["read_bytes"] - then["read_bytes"],
            stall_us=now["stall_us"] - then["stall_us"],
        )  # fmt: skip

    def resize(self, slots: tuple[int, ...], room: tuple[int, ...] = ()) -> None:
        """From now on there are so many slots of each class, and rows of each set."""
        self._writer.resize(slots, room)

    def step(self, phase: str, tokens: int, withheld_bytes: int = 0) -> None:
        """A step is over, in which slots were denied some memory."""
        self._writer.step(phase, tokens, withheld_bytes)

    def drop(self) -> None:
        """Forget a step that was interrupted or failed."""
        self._writer.drop()
        self._then, self._rows_then = self._statistics(), self._of_rows()

    def close(self) -> None:
        """End the trace."""
        self._writer.close()
