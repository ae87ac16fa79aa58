"""Hands a layer the bundles it wants, for as long as it computes with them.

Resident bundles are just there. Of streamed ones a layer's whole demand is issued at once; what is
in memory can be computed while the rest lands, and what the next layers will want is read ahead:
all of it where that is certain, the likeliest where it is foreseen. A policy ranks what may leave;
it never sees memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import planner
from ._native import ffi, pointer
from .format import Kind
from .lookahead import Lookahead
from .policies import Policy
from .residency import Residency

if TYPE_CHECKING:
    from .recorder import Recorder

AHEAD = 2
"""Turns that are read ahead where their demand is certain: one being read, one waiting."""

Foresee = Callable[[], np.ndarray]
"""What the next layer will likely want, likeliest first: bundles, uint32 [n]."""


@dataclass(slots=True)
class Bundles:
    """Bundles held for one native call: `addresses` uint64 [n], and how to wait for them.

    `first` is their place in the turn's demand. `ready` and `ids` are what em_ffn_run takes;
    `wait()` waits for all of them.
    """

    addresses: np.ndarray
    first: int = 0
    ready: object = ffi.NULL
    ids: object = ffi.NULL
    wait: Callable[[], None] = lambda: None


class Streamer:
    """Feeds a model from a residency; `policy` ranks what streams (None: nothing does).

    `turns` int64 [n_bundles] tell when in a step each bundle has its turn; policies number them as
    layers. With `lookahead` what a model foresees is read ahead. `recorder`, where there is one, is
    told of every streamed turn, every step and every change of slots.
    """

    def __init__(
        self, residency: Residency, policy: Policy | None = None, turns: np.ndarray | None = None,
        lookahead: bool = True,
    ):  # fmt: skip
        self._residency = residency
        self._policy = policy
        self.recorder: Recorder | None = None
        self._demand: list[np.ndarray] = []
        self._lookahead = Lookahead() if lookahead else None
        self._foreseen = np.empty(0, np.uint32)
        if policy is not None:
            self._turns = turns[residency.streamed]
            self._wanted = np.zeros(len(residency.streamed), bool)
            self._certain = _certain(residency, self._turns)

    def hold(self, ids: np.ndarray) -> _Hold:
        """A context manager that gives the addresses (uint64 [n]) of resident bundles `ids`."""
        self._demand.append(ids)
        return _Hold(self._residency.addresses[ids])

    def rounds(
        self, ids: np.ndarray, uses: np.ndarray | None = None, tokens: int = 1,
        foresee: Foresee | None = None,
    ) -> Iterator[Bundles]:  # fmt: skip
        """Bundles `ids` (uint32, ascending) of one turn, in one round or in as many as memory asks.

        A round's reads run while the one before it is computed. `uses` says how many of the step's
        `tokens` take each bundle. `foresee` is called, if at all, while the last reads run.
        """
        self._demand.append(ids)
        indices = self._residency.index_of[ids]
        if indices[0] < 0:
            yield Bundles(self._residency.addresses[ids])
            return
        turn = int(self._turns[indices[0]])
        self._policy.observe(turn, indices, uses, tokens)
        ranks = self._policy.ranks(turn)
        indices = indices.astype(np.uint32)
        size = self._round_size(indices)
        held: list[tuple[np.ndarray, np.ndarray, int]] = []
        try:
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                held.append((part, self._residency.acquire(part, ranks), start))
                if len(held) == 2:
                    yield from self._give(held)
            self._learn(indices)
            self._look_ahead(turn, ranks, foresee)
            while held:
                yield from self._give(held)
        finally:
            for part, _, _ in held:
                self._residency.release(part)
        if self.recorder is not None:
            self.recorder.demand(turn, indices, uses)

    def _give(self, held) -> Iterator[Bundles]:
        part, addresses, start = held[0]
        residency = self._residency
        at = pointer(part, "uint32_t *")
        yield Bundles(addresses, start, residency.ready, at, lambda: residency.wait(part))
        residency.release(held.pop(0)[0])

    def _round_size(self, indices: np.ndarray) -> int:
        return planner.round_size(self._residency.classes[indices], self._residency.room[indices])

    def _learn(self, indices: np.ndarray) -> None:
        """Compare what was foreseen with what came, and forget what has not started."""
        foreseen, self._foreseen = self._foreseen, self._foreseen[:0]
        if not len(foreseen):
            return
        self._wanted[indices] = True
        used = self._wanted[foreseen]
        self._wanted[indices] = False
        self._lookahead.learn(len(foreseen), int(used.sum()))
        self._residency.cancel(foreseen[~used])

    def _look_ahead(self, turn: int, ranks: np.ndarray, foresee: Foresee | None) -> None:
        """Start on the next turns' bundles while this turn is computed."""
        certain = self._certain.get(turn)
        if certain is not None:
            self._residency.prefetch(certain, ranks)
        if foresee is None or self._lookahead is None:
            return
        residency = self._residency
        room = self._lookahead.admit(*residency.clocks())
        if not room:
            return
        likely = residency.index_of[foresee()].astype(np.uint32)
        absent = likely[residency.flags[likely] == 0]
        if len(absent):
            # The resident among them go along, so that none of them makes place for another.
            residency.prefetch(np.concatenate([absent, likely]), ranks, room)
            self._foreseen = absent

    def resize(self, slots: dict[int, int]) -> None:
        """Change the slots of each layout class. Not while a step runs."""
        self._residency.resize(slots, self._policy.ranks(0))
        self._certain = _certain(self._residency, self._turns)
        if self.recorder is not None:
            self.recorder.resize(self.slots)

    @property
    def slots(self) -> tuple[int, ...]:
        """How many slots there are now of each layout class that streams."""
        return tuple(self._residency.slots.values())

    def end_step(self, phase: str, tokens: int, withheld_bytes: int = 0) -> None:
        """A step of `tokens` tokens is over, in which slots were denied some memory."""
        if self.recorder is not None:
            self.recorder.step(phase, tokens, withheld_bytes)

    def settle(self) -> None:
        """Forget what an interrupted step held and demanded."""
        self._residency.release_all()
        if len(self._foreseen):
            self._residency.cancel(self._foreseen)
        self._demand = []
        self._foreseen = self._foreseen[:0]
        if self.recorder is not None:
            self.recorder.drop()

    def clear(self, policy: Policy | None) -> None:
        """Empty the slots and start anew with another policy. A trace cannot say so: it ends."""
        self._residency.clear()
        self._policy = policy
        self._lookahead = Lookahead() if self._lookahead else None
        self._foreseen = self._foreseen[:0]
        self.end_recording()

    def end_recording(self) -> None:
        """Let go of the recorder."""
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = None

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


class _Hold:
    __slots__ = ("_addresses",)

    def __init__(self, addresses: np.ndarray):
        self._addresses = addresses

    def __enter__(self) -> np.ndarray:
        return self._addresses

    def __exit__(self, *_) -> None:
        """Resident bundles need no unpinning."""


def _certain(residency: Residency, turns: np.ndarray) -> dict[int, np.ndarray]:
    """For each turn the bundles that are certainly wanted next: dense layers, and the head.

    As many of them as the slots can hold beside those that are in use.
    """
    sure = np.flatnonzero(np.isin(residency.kinds, (Kind.FFN, Kind.HEAD)))
    order = np.unique(turns)
    found = {}
    for place, turn in enumerate(order.tolist()):
        following = np.roll(order, -place - 1)[:AHEAD]
        ahead = [part for t in following if t != turn for part in [sure[turns[sure] == t]]]
        ids = [part[: _beside(residency, part)] for part in ahead if len(part)]
        if ids:
            found[turn] = np.concatenate(ids).astype(np.uint32)
    return found


def _beside(residency: Residency, part: np.ndarray) -> int:
    """How many of a turn's certain bundles fit beside the bundles of the present turn."""
    room = int(residency.room[part].min())
    return max(0, room // 2 if len(part) > 1 else room - 1)
