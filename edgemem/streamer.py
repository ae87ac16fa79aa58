"""Hands a model's parts the bundles they want, for as long as they compute with them.

Resident bundles are just there. Of streamed ones a turn's whole demand is issued at once; what is
in memory can be computed while the rest lands, and what the next layers will want is read ahead:
all of it where that is certain, the likeliest where it is foreseen. A policy ranks what may leave;
it never sees memory.

Turns run inside native calls (native/stream.c). This is what they work on, and what they call back
where Python has a say: a policy that is written in it, and the recorder of a trace.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np

from ._native import check, ffi, lib, pointer
from .errors import EdgeMemError, UnsupportedError
from .demand import DemandLog
from .format import Kind
from .lookahead import Lookahead
from .policies import Policy
from .residency import Residency

if TYPE_CHECKING:
    from .recorder import Recorder
    from .rows import RowCache
    from .store import Store

AHEAD = 2
"""Turns that are read ahead where their demand is certain: one being read, one waiting."""


class Streamer:
    """Feeds a model from a residency; `policy` ranks what streams (None: nothing does).

    `turns` int64 [n_bundles] tell when in a step each bundle has its turn; policies number them as
    layers. With `lookahead` what a model foresees is read ahead, and with `ahead` what is certain.
    `rows` holds those of bundles that come apart, of which there may be no others. `recorder`,
    where there is one, is told of every turn of either, every step and every change of slots.
    `stream` is the em_stream that native operations take.
    """

    def __init__(
        self, residency: Residency, policy: Policy | None = None, turns: np.ndarray | None = None,
        lookahead: bool = True, rows: RowCache | None = None, ahead: bool = True,
    ):  # fmt: skip
        self._residency, self.rows = residency, rows
        self._recorder: Recorder | None = None
        self._raised: BaseException | None = None
        self._me = ffi.new_handle(weakref.ref(self))
        self._resident_demand = 0
        self._log: DemandLog | None = None
        n, m = len(residency.sizes), len(residency.streamed)
        arrays = {  # what the stream points into
            "addresses": residency.addresses, "sizes": residency.sizes,
            "index_of": residency.index_of, "foreseen": np.zeros(m, np.uint32),
            "indices": np.zeros(n, np.uint32), "held": np.zeros(n, np.uint64),
            "uses": np.zeros(n, np.int32), "likely": np.zeros(2 * m, np.uint32),
            "likelihood": np.zeros(m, np.float32), "wanted": np.zeros(m, np.uint8),
        }  # fmt: skip
        self.stream = ffi.new("em_stream *", {"residency": residency.native, "user": self._me})
        self.stream.pause = lib.edgemem_pause
        self._owners: dict[str, tuple] = {}
        for name, array in arrays.items():
            self._point(name, array)
        self._lookahead, self._ahead, self._policy = lookahead, ahead, None
        if policy is not None:
            self._turns = turns[residency.streamed]
            self._point("turn_of", self._turns.astype(np.int32))
            self._rank_by(policy)
            self._fit()

    def resident(self, bundle: int) -> int:
        """The address of a bundle that stays where it is until the streamer is closed."""
        return int(self._residency.addresses[bundle])

    def find_neurons(self, store: Store, bundle: int, found) -> None:
        """Say in `found` (em_neuron_rows) where a bundle's rows are. Raises CorruptError."""
        if self.rows is None:
            start, layout = self.resident(bundle), store.layout_of(bundle)
            found.resident = ffi.cast("void *", start + layout["neurons"].offset)
            if "places" in layout:
                places = layout["places"]
                found.places = ffi.cast("uint32_t *", start + places.offset)
                words = np.frombuffer(ffi.buffer(found.places, 4 * places.cols), np.uint32)
                store.check_places(bundle, words)
        else:
            found.rows, found.set = self.rows.native, self.rows.set_of(bundle)

    def use_resident(self, bundles: np.ndarray, unread_bytes: int = 0) -> None:
        """This step computes with these resident bundles, outside any turn, but for some bytes."""
        self._resident_demand += int(self._residency.sizes[bundles].sum()) - unread_bytes

    def check(self, status: int, doing: str) -> None:
        """Raise what a native operation's status means, if anything; `doing` says what it did."""
        if status == lib.EM_FLASH:
            of_row = None if self.rows is None else self.rows.error()
            raise of_row or self._residency.error()
        if status == lib.EM_RAISED:
            try:
                raise self._raised or EdgeMemError(f"{doing}: what it called failed; see above")
            finally:
                self._raised = None
        if status == lib.EM_UNSUPPORTED:
            raise UnsupportedError(
                f"{doing}: the engine is closed, in the middle of a step, or another process's"
            )
        check(status, doing)

    def check_idle(self) -> None:
        """Raise ValueError in the middle of a step: signals' functions and policies may run there,
        and are not to run another."""
        if self.stream.busy:
            raise ValueError("the engine is in the middle of a step: wait until it is over")

    @property
    def recorder(self) -> Recorder | None:
        """Who records a trace."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self.stream.record = ffi.NULL if recorder is None else lib.edgemem_record
        if self.rows is not None:
            self.rows.record(ffi.NULL if recorder is None else lib.edgemem_record_rows, self._me)

    def resize(self, slots: dict[int, int]) -> None:
        """Change the slots of each layout class. Not while a step runs."""
        if self._policy is not None:
            self._residency.resize(slots, self._policy.ranks(0))
            self._fit()
        if self.rows is not None:
            self.rows.resize(slots)
        if self._log is not None:
            self._log.resized.append((self._log.n_turns, self.slots))
        if self._recorder is not None:
            self._recorder.resize(self.slots, () if self.rows is None else self.rows.rooms)

    @property
    def slots(self) -> tuple[int, ...]:
        """How many slots there are now of each layout class that streams."""
        return tuple(self._residency.slots.values())

    def load_again(self) -> None:
        """Read all that stays in memory once more, and let all else leave: for comparisons."""
        self._residency.clear()
        self._residency.load_again()

    def end_step(self, phase: str, tokens: int, withheld_bytes: int = 0) -> None:
        """A step of `tokens` tokens is over, in which slots were denied some memory."""
        if self._recorder is not None:
            self._recorder.step(phase, tokens, withheld_bytes)

    def settle(self) -> None:
        """Forget what an interrupted step held and demanded."""
        stream = self.stream
        self._residency.release_all()
        self._raised = None
        if stream.n_foreseen and stream.residency:
            self._residency.cancel(stream.foreseen, stream.n_foreseen)
        self.take_demand()
        stream.n_foreseen = 0
        if self._recorder is not None:
            self._recorder.drop()

    def clear(self, policy: Policy | None) -> None:
        """Empty the slots and start anew with another policy. A trace cannot say so: it ends."""
        self._residency.clear()
        if self.rows is not None:
            self.rows.clear()
        self.stream.n_foreseen = 0
        if policy is not None:
            self._rank_by(policy)
        self.end_recording()

    def end_recording(self) -> None:
        """Let go of the recorder, and of the logs."""
        self._log = None
        if self.rows is not None:
            self.rows.end_recording()
        self._set("log", ffi.NULL, None)
        if self._recorder is not None:
            self._recorder.close()
        self.recorder = None

    def write_down(self, indices_room: int, turns_room: int) -> DemandLog:
        """A log of what streamed turns demand from now on, with room for so much."""
        self._log = log = DemandLog(indices_room, turns_room, self.slots)
        self._set("log", log.native, log)
        return log

    @property
    def io_engine(self) -> str:
        """What reads bundles, or where none stream rows; or "none"."""
        bundles = self._residency.engine
        return self.rows.engine if self.rows is not None and bundles == "none" else bundles

    def take_demand(self) -> int:
        """Bytes of the bundles used since this was last asked, counted once for each use."""
        demand = self.stream.demand_bytes + self._resident_demand
        self.stream.demand_bytes = self._resident_demand = 0
        return demand

    def statistics(self, rows: bool = True) -> dict[str, int]:
        """The counters of bundles that stream, and of `rows`; but for what these wait, which the
        core's clock counts: that is taken away where they are left out."""
        counted = self._residency.statistics()
        if self.rows is None:
            return counted
        more = self.rows.statistics()  # both may read at once: then their busy times overlap
        stalled = more.pop("stall_us", 0)
        if not rows:
            return counted | {"stall_us": counted.get("stall_us", 0) - stalled}
        return counted | {name: n + counted.get(name, 0) for name, n in more.items()}

    def close(self) -> None:
        """Wait for reads in flight and let go of the store's file."""
        self.stream.residency, self.stream.n_foreseen = ffi.NULL, 0
        self._residency.close()
        if self.rows is not None:
            self.rows.close()
        self.end_recording()

    def _set(self, name: str, value, owner: object) -> None:
        """Set a field of the stream; what it points to has an owner, whatever interrupts this."""
        self._owners[name] = (owner, self._owners.get(name))
        setattr(self.stream, name, value)
        self._owners[name] = (owner, None)

    def _point(self, name: str, array: np.ndarray) -> None:
        ctype = "float *" if array.dtype == np.float32 else f"{array.dtype.name}_t *"
        at = pointer(np.ascontiguousarray(array), ctype)
        self._set(name, at, at)

    def _rank_by(self, policy: Policy) -> None:
        self._policy = policy
        self._point("ranks", policy.ranks(0))
        self.stream.observe = lib.edgemem_observe
        self._set("policy", policy.native, policy)
        ahead = Lookahead() if self._lookahead else None
        self._set("lookahead", ffi.NULL if ahead is None else ahead.state, ahead)

    def _fit(self) -> None:
        """What is certain depends on the slots. An interrupt in the middle does no harm: before the
        next step the engine changes slots again."""
        first, certain = _certain(self._residency, self._turns, AHEAD if self._ahead else 0)
        self._point("certain_first", first)
        self._point("certain", certain)

    def _observe(
        self, turn: int, indices: np.ndarray, uses: np.ndarray | None, tokens: int
    ) -> None:
        """A turn begins."""
        self._policy.observe(turn, indices, uses, tokens)
        self._point("ranks", self._policy.ranks(turn))

    def _pause(self, *_) -> None:
        """A round of several is over. Signals are heard whenever Python runs: there is no more."""

    def _record(self, turn: int, indices: np.ndarray, uses: np.ndarray | None, *_) -> None:
        """A turn is over."""
        self._recorder.demand(turn, indices, uses)

    def _record_rows(self, number: int, ids: np.ndarray, *_) -> None:
        """A turn of a set of rows is over."""
        self._recorder.rows(number, ids)


def _called_back(name: str) -> None:
    """Make native code call a streamer's `name(turn, indices, uses, tokens)`: streamed bundles, or
    rows of a set, uint32 [n], and how many of the tokens take each, int32 [n], or None for one;
    both its own.

    What it raises ends the step: `Streamer.check` raises it again.
    """

    def call(me, turn, indices, n, uses, tokens) -> int:
        demanded = np.frombuffer(ffi.buffer(indices, 4 * n), np.uint32).copy()
        counts = None
        if uses != ffi.NULL:
            counts = np.frombuffer(ffi.buffer(uses, 4 * n), np.int32).copy()
        getattr(ffi.from_handle(me)(), name)(turn, demanded, counts, tokens)
        return lib.EM_OK

    def failed(exception, value, traceback) -> None:
        if traceback is not None:  # without, `call` was not even begun, and cffi tells why
            me = traceback.tb_frame.f_locals["me"]
            ffi.from_handle(me)()._raised = value.with_traceback(traceback)

    ffi.def_extern(f"edgemem{name}", error=lib.EM_RAISED, onerror=failed)(call)


for _name in ("_observe", "_pause", "_record", "_record_rows"):
    _called_back(_name)


def _certain(residency: Residency, turns: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(first [n_turns + 1], bundles): what is certainly wanted in so many turns after turn t, dense
    layers and the head, are `bundles[first[t] : first[t + 1]]`.

    As many of them as the slots can hold beside those that are in use.
    """
    sure = np.flatnonzero(np.isin(residency.kinds, (Kind.FFN, Kind.HEAD)))
    order = np.unique(turns)
    found = [np.empty(0, np.int64)] * (int(order[-1]) + 1)
    for place, turn in enumerate(order.tolist()):
        following = np.roll(order, -place - 1)[:most]
        ahead = [part for t in following if t != turn for part in [sure[turns[sure] == t]]]
        ids = [part[: _beside(residency, part)] for part in ahead if len(part)]
        if ids:
            found[turn] = np.concatenate(ids)
    first = np.cumsum([0, *map(len, found)])
    return first.astype(np.int32), np.concatenate(found).astype(np.uint32)


def _beside(residency: Residency, part: np.ndarray) -> int:
    """How many of a turn's certain bundles fit beside the bundles of the present turn."""
    room = int(residency.room[part].min())
    return max(0, room // 2 if len(part) > 1 else room - 1)
