"""Hands a layer the bundles it wants, for as long as it computes with them.

Resident bundles are just there. Of streamed ones a layer's whole demand is issued at once; what is
in memory can be computed while the rest lands. A policy ranks what may leave; it never sees memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import planner
from ._native import ffi, pointer
from .format import Kind
from .policies import Policy
from .residency import Residency

if TYPE_CHECKING:
    from .recorder import Recorder

AHEAD = 2
"""Layers that are read ahead where their demand is certain: one being read, one waiting."""


@dataclass(slots=True)
class Bundles:
    """Bundles held for one native call: `addresses` uint64 [n], and how to wait for them.

    `first` is their place in the layer's demand. `ready` and `ids` are what em_ffn_run takes.
    """

    addresses: np.ndarray
    first: int = 0
    ready: object = ffi.NULL
    ids: object = ffi.NULL


class Streamer:
    """Feeds a model from a residency; `policy` ranks what streams (None: nothing does).

    `recorder`, where there is one, is told of every streamed layer and every step.
    """

    def __init__(self, residency: Residency, policy: Policy | None = None):
        self._residency = residency
        self._policy = policy
        self.recorder: Recorder | None = None
        self._demand: list[np.ndarray] = []
        self._certain_after = _certain_after(residency)

    def hold(self, ids: np.ndarray) -> _Hold:
        """A context manager that gives the addresses (uint64 [n]) of resident bundles `ids`."""
        self._demand.append(ids)
        return _Hold(self._residency.addresses[ids])

    def rounds(
        self, layer: int, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1
    ) -> Iterator[Bundles]:
        """Bundles `ids` (uint32, ascending) of a layer, in one round or in as many as memory asks.

        A round's reads run while the one before it is computed. `uses` says how many of the step's
        `tokens` take each bundle.
        """
        self._demand.append(ids)
        indices = self._residency.index_of[ids]
        if indices[0] < 0:
            yield Bundles(self._residency.addresses[ids])
            return
        self._policy.observe(layer, indices, uses, tokens)
        ranks = self._policy.ranks(layer)
        indices = indices.astype(np.uint32)
        size = self._round_size(indices)
        held: list[tuple[np.ndarray, np.ndarray, int]] = []
        try:
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                held.append((part, self._residency.acquire(part, ranks), start))
                if len(held) == 2:
                    yield from self._give(held)
            if start + size >= len(indices):
                self._look_ahead(int(indices[-1]), ranks)
            while held:
                yield from self._give(held)
        finally:
            for part, _, _ in held:
                self._residency.release(part)
        if self.recorder is not None:
            self.recorder.demand(layer, indices, uses)

    def _give(self, held) -> Iterator[Bundles]:
        part, addresses, start = held[0]
        yield Bundles(addresses, start, self._residency.ready, pointer(part, "uint32_t *"))
        self._residency.release(held.pop(0)[0])

    def _round_size(self, indices: np.ndarray) -> int:
        return planner.round_size(len(indices), int(self._residency.room[indices].min()))

    def _look_ahead(self, last: int, ranks: np.ndarray) -> None:
        """Where the demand of the next layers is certain, start on it while this one computes."""
        if last in self._certain_after:
            self._residency.prefetch(self._certain_after[last], ranks)

    def end_step(self, phase: str, tokens: int) -> None:
        """A step of `tokens` tokens is over."""
        if self.recorder is not None:
            self.recorder.step(phase, tokens)

    def settle(self) -> None:
        """Forget what an interrupted step held and demanded."""
        self._residency.release_all()
        self._demand = []
        if self.recorder is not None:
            self.recorder.drop()

    def clear(self, policy: Policy | None) -> None:
        """Empty the slots and start anew with another policy. A trace cannot say so: it ends."""
        self._residency.clear()
        self._policy = policy
        self.end_recording()

    @property
    def slots(self) -> tuple[int, ...]:
        """How many slots there are now of each layout class that streams."""
        return tuple(slots.count for slots in self._residency.slots)

    def error(self) -> Exception:
        """The exception for the read that failed."""
        return self._residency.error()

    def take_demand(self) -> int:
        """Bytes of the bundles held since this was last asked, counted once for each hold."""
        ids, self._demand = self._demand, []
        return int(self._residency.sizes[np.concatenate(ids)].sum()) if ids else 0

    def statistics(self) -> dict[str, int]:
        """The residency's counters."""
        return self._residency.statistics()

    def close(self) -> None:
        """Wait for reads in flight and let go of the store's file."""
        self._residency.close()
        self.end_recording()

    def end_recording(self) -> None:
        """Let go of the recorder."""
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = None


class _Hold:
    __slots__ = ("_addresses",)

    def __init__(self, addresses: np.ndarray):
        self._addresses = addresses

    def __enter__(self) -> np.ndarray:
        return self._addresses

    def __exit__(self, *_) -> None:
        """Resident bundles need no unpinning."""


def _certain_after(residency: Residency) -> dict[int, np.ndarray]:
    """For each streamed FFN those of the next layers, as many as its slots can hold beside it."""
    kinds, n = residency.kinds, len(residency.kinds)
    found = {}
    for index in np.flatnonzero(kinds == Kind.FFN).tolist():
        ahead = min(AHEAD, int(residency.room[index]) - 1, n - 1)
        following = [(index + i) % n for i in range(1, ahead + 1)]
        certain = [i for i in following if kinds[i] == Kind.FFN]
        if certain:
            found[index] = np.array(certain, np.uint32)
    return found
