"""What a run demanded, written down by native code for those who ask afterwards what was best."""

from __future__ import annotations

import numpy as np

from ._native import ffi, pointer


class DemandLog:
    """What turns demanded since it was begun: `counts` uint32 [n_turns] bundles each, and all their
    `indices` uint32, one turn's after the other's. Both raise AssertionError where room ended.

    `resized` says from which turn on there were how many slots of each layout class.
    """

    def __init__(self, indices_room: int, turns_room: int, slots: tuple[int, ...]):
        self.resized = [(0, slots)]
        self._indices = np.zeros(max(indices_room, 1), np.uint32)
        self._counts = np.zeros(max(turns_room, 1), np.uint32)
        self._pointers = [pointer(array, "uint32_t *") for array in (self._indices, self._counts)]
        self.native = ffi.new("em_demand_log *", {
            "indices": self._pointers[0], "counts": self._pointers[1],
            "indices_room": indices_room, "turns_room": turns_room,
        })  # fmt: skip

    @property
    def is_whole(self) -> bool:
        """Whether there was room for all."""
        native = self.native
        return native.n_turns <= native.turns_room and native.n_indices <= native.indices_room

    @property
    def n_turns(self) -> int:
        return self.native.n_turns

    @property
    def counts(self) -> np.ndarray:
        assert self.n_turns <= self.native.turns_room, "more turns than were foreseen"
        return self._counts[: self.n_turns]

    @property
    def indices(self) -> np.ndarray:
        assert self.native.n_indices <= self.native.indices_room, "more demand than was foreseen"
        return self._indices[: self.native.n_indices]
