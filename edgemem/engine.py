"""Engines: a store made ready to run, inside a memory budget."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter

import numpy as np

from . import inventory, models, policies
from .arguments import (
    LOADINGS,
    MAX_THREADS,
    Streaming,
    check_count,
    check_isa,
    check_kv,
    check_loading,
    check_predict,
    check_sparse,
    check_streaming,
    context_limit,
)
from .budget import Budget, Item, fast_cpus, show_size
from .format import neuron_parts
from .generation import Generation
from .governor import Governor
from .kernels import Core
from .kvcache import KvCache
from .models.workspace import ScratchLoan
from .needs import Needs, advise_memory
from .recorder import Recorder, header
from .residency import Residency, Slots
from .rows import RowCache
from .sequence import TokenSequence, check_room
from .session import DEFAULT_TOKENS, Session, check_ids, checked
from .store import Store
from .streamer import Streamer
from .tokenizer import ENCODING_BYTES, Tokenizer
from .trace import COUNTERS, Trace
from .tracefile import TraceWriter, popularity
from .tracefile import read as read_trace

TEXT_BYTES = 2048
"""A text up to this length is encoded within the headroom."""

Progress = Callable[[int, int], None]


def load(
    path: str | os.PathLike, memory: str | int = "auto", context: int | None = None,
    threads: int | None = None, progress: Progress | None = None,
    ready: Callable[[Engine], None] | None = None, *, kv: str = "f16",
    policy: str = policies.DEFAULT, profile: str | os.PathLike | None = None,
    lookahead: bool = True, io_engine: str | None = None, faults: dict | None = None,
    trace: str | os.PathLike | None = None, predict: bool = False, sparse: bool = False,
    loading: str = "stream", windowing: bool = True, bundling: bool = True,
) -> Engine:  # fmt: skip
    """Open a store and make its model ready to run.

    What does not fit `memory` streams: `policy` (one of policies.POLICIES) ranks what stays, for
    "static" by popularity in `profile`, a trace that was recorded before. `lookahead` reads what
    the next layers will likely want while the device has nothing else to do. `io_engine` is
    "io_uring" or "threads" (None: the best that works here), and `faults` (the fields of
    em_faults) makes reads misbehave, for tests. `trace` is a file to record what streamed layers
    demand in every step (edgemem/tracefile.py); it replaces an older one. For comparisons,
    `loading` may be "hybrid" (what does not fit is read in its turn, nothing ahead) or "naive" (all
    weights are read again in each step), neurons of earlier tokens need not stay (`windowing`), and
    parts of a neuron may be read one by one (`bundling`). None of them changes an answer.

    `kv` is the type of the KV cache, and does change it: "f16", "q8_0" (about half the memory,
    less exact) or "f32" (twice, exact); see kvcache.py. So does `predict`: which neurons are
    active is foretold by what `calibrate` trained, not computed. And `sparse`: neurons below the
    thresholds that were calibrated count as resting. Not both at once.

    `memory` is the budget of the whole process: bytes, "4GiB", "50%" or "auto" (what is free here,
    less a reserve). `context` is the most tokens a session can hold, by default 4096 or what the
    model was made for, if that is less; more than `context_limit(spec)` is refused. `threads`
    (at most 1024) defaults to the fast ones of this process's cores. `progress(done_bytes,
    total_bytes)` is called while weights are read; before that, `ready(engine)`, when all else is
    known: `engine.check` works from then on, and what `ready` raises ends the loading.

    Raises StoreError for what is wrong with the store, and BudgetError, with the sum, before any
    weight is read; ValueError or TypeError for arguments.
    """
    how = Streaming(
        policy, profile, lookahead, io_engine, faults, trace, loading, windowing, bundling
    )  # fmt: skip
    return Engine(path, memory, context, threads, progress, ready, how, kv, predict, sparse)


class Engine:
    """A loaded model. Thread-safe: steps of its sessions take turns.

    `spec` (ModelSpec), `tokenizer`, `trace`, `store`, `budget`, `context`, `kv`, `threads` and
    `isa` are for reading.
    """

    def __init__(
        self, path: str | os.PathLike, memory: str | int, context: int | None,
        threads: int | None, progress: Progress | None = None,
        ready: Callable[[Engine], None] | None = None, streaming: Streaming = Streaming(),
        kv: str = "f16", predict: bool = False, sparse: bool = False,
    ):  # fmt: skip
        check_count("context", context)
        check_count("threads", threads, MAX_THREADS)
        check_isa()
        check_kv(kv)
        check_streaming(streaming)
        self.kv, self.predict, self.sparse, self._streaming = kv, predict, sparse, streaming
        self.budget = Budget(memory)
        self.threads = min(fast_cpus(), MAX_THREADS) if threads is None else int(threads)
        self.store = Store.open(path)
        try:
            check_predict(self.store, predict)
            check_sparse(self.store, sparse, predict)
            check_loading(self.store, streaming)
            self._prepare(context)
            if ready is not None:
                ready(self)
            self._load(progress)
        except BaseException:
            self.store.close()
            raise

    def _prepare(self, context: int | None) -> None:
        """Everything that is known before weights are read; ends with the budget's consent."""
        self.spec = spec = self.store.spec
        self.tokenizer = Tokenizer(self.store.tokenizer_json, self.store.tokenizer_config)
        self.bos_id = self.tokenizer.bos_id if spec.bos_id is None else spec.bos_id
        self.eos_ids = self.store.eos_ids
        self._needs = needs = Needs(
            self.store,
            self.budget.limit,
            context,
            self.threads,
            self.kv,
            self.predict,
            sparse=self.sparse,
        )
        self.context, self.context_limit = needs.context, context_limit(spec)
        self.chunk_tokens, self.logits_tokens = needs.chunk_tokens, needs.logits_tokens
        self._plan, self._kv_item = needs.plan, needs.kv_item
        self.trace = Trace()
        # Reentrant: a sequence may be freed by the garbage collector in the middle of anything.
        self._lock = threading.RLock()
        self._model = self._streamer = None
        # The first session's logits are in scratch.
        self._session_items = [self._kv_item, Item("its logits", 4 * spec.vocab_size)]
        self._cache_count = 0
        self._freed: deque[None] = deque()
        self._caches: weakref.WeakSet[KvCache] = weakref.WeakSet()
        self._governor = Governor()
        self._popularity: np.ndarray | None = None  # of the profile, read once
        self._text_promise = 0
        self._all_logits_promised = False
        self._scratch_loan = ScratchLoan(spec, self.chunk_tokens, self.threads)
        self._advise = partial(needs.advise, self.budget)
        self.budget.take(needs.items, self._advise)

    def _slab_room(self) -> int:
        """Bytes that slots may take now: what is theirs, and what others do not use yet."""
        unused = max(1, self._cache_count) * self._kv_item.bytes
        unused -= sum(cache.bytes - cache.unused_bytes for cache in self._caches)
        unused += self._scratch_loan.bytes
        return self._needs.slab_room(self.budget.spare, unused)

    def _fit_slab(self) -> None:
        """Open or close slots so that they fill what nothing else needs. Not while a step runs."""
        if not self._plan.streams:
            return
        with self._lock:
            if self._streamer is None:  # not loaded yet, or closed meanwhile
                return
            self._streamer.check_idle()
            if self._stepping:  # the last step was interrupted, who knows where
                self._settle()
            room = self._slab_room()
            self._withheld = self._governor.withheld(room - self._plan.least_bytes)
            room -= self._withheld
            if room == self._fitted:
                return
            slots = self._plan.slots(room)
            if slots != self.slots or self._fitted is None:
                self._fitted = None  # until all is as it is to be: an interrupt may come between
                self._streamer.resize(slots)
                self.slots = slots
            self._fitted = room

    def _promise(self, items: Sequence[Item], what: str, advise: Callable | None = None) -> None:
        """Put `items` into the budget before their memory is used; slots make place for them."""
        with self._lock:
            self._account_freed()
        self.budget.take(items, advise or self._advise, what)
        try:
            self._fit_slab()
        except BaseException:
            self.budget.give_back(items)
            raise

    def _load(self, progress: Progress | None) -> None:
        started = perf_counter()
        self._core = Core(self.threads)
        self.isa = self._core.isa
        room = self._slab_room()
        self.slots = self._plan.slots(room)
        streamed, apart, how, writer = self._plan.streamed, self._plan.apart, self._streaming, None
        whole = np.unique(self.store.entries["layout"][streamed]).tolist()
        held = {layout: self.slots[layout] for layout in whole}
        policy = self._new_policy()
        turns = inventory.turns(self.store)
        if how.trace is not None:
            said = header(self.store, streamed, apart, turns, self.slots, how.policy, how.lookahead)
            writer = TraceWriter(how.trace, said)
        reading = how.io_engine, how.faults
        slots = [Slots(*item) for item in held.items()]
        elsewhere = [*apart, *inventory.left_out(self.store, self.predict)]
        residency = Residency(self.store, streamed, slots, progress, *reading, elsewhere)
        rows = RowCache(self.store, apart, self.slots, *reading) if len(apart) else None
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._stepping, self._withheld, self._fitted = False, 0, room
        if rows is not None and not how.bundling:
            rows.read_in(neuron_parts(self.spec))
        ahead = how.loading == LOADINGS[0]
        self._streamer = Streamer(residency, policy, turns, how.lookahead and ahead, rows, ahead)
        if writer is not None:
            of_rows = rows.statistics if rows else dict
            bundles = partial(self._statistics, rows=False)
            self._streamer.recorder = Recorder(writer, bundles, of_rows)
        self._model = models.build(
            self.store, self._streamer, self._core, self.chunk_tokens, self.predict
        )
        if self.sparse:
            self.rest(self.spec.thresholds)
        self._streamer.take_demand()  # of nobody's step
        self.load_seconds = perf_counter() - started

    def _new_policy(self) -> policies.Policy | None:
        streamed = self._plan.streamed
        how = self._streaming
        if not len(streamed):
            if how.profile is not None:  # not needed now, but a wrong one is told all the same
                read_trace(how.profile)
            return None
        turns = inventory.turns(self.store)[streamed]
        if how.profile is not None and self._popularity is None:
            self._popularity = popularity(how.profile, turns.tolist())
        return policies.build(how.policy, turns, self.spec.n_layers + 2, self._popularity)

    def session(self) -> Session:
        """A new, empty sequence. Raises BudgetError if its KV cache does not fit the budget."""
        self._check_open()
        return Session(self)

    def generate(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options
    ) -> str | Generation:
        """Generate from `prompt` in a session of its own; the options of `Session.generate`."""
        return self.session().generate(prompt, stream=stream, **options)

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits after each of `ids`, which start at position 0: float32 [n, vocab].

        What is returned (n · vocab · 4 bytes) is the caller's own: it is in the budget only while
        it is made. Raises BudgetError where it does not fit then.
        """
        self._check_open()
        ids = check_ids(ids, self.spec.vocab_size)
        check_room(self, 0, len(ids))
        label = f"logits of {len(ids)} tokens, the caller's"
        item = Item(label, 4 * len(ids) * self.spec.vocab_size)
        self._promise([item], f"what logits of {len(ids)} tokens need")
        try:
            out = np.empty((len(ids), self.spec.vocab_size), np.float32)
            done = 0
            for rows in TokenSequence(self).each_logits(ids):
                out[done : done + len(rows)] = rows
                done += len(rows)
            return out
        finally:
            self.budget.give_back([item])

    def check(
        self, prompt: str | Sequence[int], *, max_tokens: int = DEFAULT_TOKENS,
        stop: str | Iterable[str] | None = None, **sampling,
    ) -> None:  # fmt: skip
        """Raise what `generate` would raise for these arguments; needs no weights."""
        checked(self, 0, prompt, max_tokens, stop, sampling)

    def text_room(self, tokens: int | None = None) -> int:
        """No text of more bytes can be encoded: it has over `tokens` tokens, or the budget ends."""
        fits = TEXT_BYTES + (self.budget.spare + self._text_promise) // ENCODING_BYTES
        longest = None if tokens is None else self.tokenizer.longest_token
        return fits if longest is None else min(fits, tokens * longest)

    def watch(self, watcher: Callable[[int, np.ndarray], None] | None) -> None:
        """Show `watcher(layer, inputs)` what each layer's feed-forward parts read of every step,
        float32 [n, hidden], the model's own; None: nobody."""
        self._model.watch = watcher

    def rest(self, thresholds: Sequence[float]) -> None:
        """Let neurons of up to each layer's magnitude count as resting from now on."""
        self._model.rest(thresholds)

    def close(self) -> None:
        """Free the weights and the store. Closing twice is fine; sessions cannot run afterwards."""
        with self._lock:
            if self._streamer is not None:
                self._streamer.check_idle()
                self._streamer.close()
            self._model = self._streamer = self._core = None
        self.store.close()

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def step(self, ids: np.ndarray, kv: KvCache, phase: str, out: np.ndarray | None) -> None:
        """One forward pass of a sequence: `ids` int32 [n ≤ chunk_tokens], after what `kv` holds.

        `out` takes logits: float32 [vocab] those after the last id, [n, vocab] all of them, None
        none.
        """
        with self._lock:
            self._check_open()
            self._streamer.check_idle()
            if self._stepping:  # the last step was interrupted, who knows where
                self._settle()
            kv.touch(kv.position + len(ids))
            if self._plan.streams:
                self._scratch_loan.expect(len(ids), self._model.trim)
            self._fit_slab()
            self._stepping = True
            started = perf_counter()
            if self._streaming.loading == "naive":
                self._streamer.load_again()
            n_logits = 0 if out is None else len(np.atleast_2d(out))
            logits = self._model.step(ids, kv, n_logits)
            if out is not None:
                np.copyto(np.atleast_2d(out), logits)
            seconds, demand = perf_counter() - started, self._streamer.take_demand()
            counters = self._take_counters()
            self.trace.record(phase, len(ids), seconds, demand, self._withheld, **counters)
            self._streamer.end_step(phase, len(ids), self._withheld)
            if self._streamer.rows is not None and not self._streaming.windowing:
                self._streamer.rows.clear()
            self._stepping = False

    def _settle(self) -> None:
        """Start over after a step that was interrupted in the middle."""
        self._streamer.settle()
        self._take_counters()
        self._stepping = False

    def _take_counters(self) -> dict[str, int]:
        """What streaming did since this was last asked."""
        then, self._counted = self._counted, self._statistics()
        return {name: self._counted[name] - then[name] for name in COUNTERS}

    def _statistics(self, rows: bool = True) -> dict[str, int]:
        """What streaming has done since open, of bundles and of `rows`."""
        now = dict.fromkeys(COUNTERS, 0) | self._streamer.statistics(rows)
        return now | {"stall_us": now["stall_us"] + int(self._core.clocks()["stall"] * 1e6)}

    def clear(self) -> None:
        """Empty the slots and forget what was learned of the demand, as just after loading.

        A trace that is being recorded ends.
        """
        with self._lock:
            self._check_open()
            self._streamer.check_idle()
            self._settle()
            self._streamer.clear(self._new_policy())

    def new_kv(self) -> KvCache:
        """A KV cache for a sequence. One is always in the budget; more are added to it."""
        with self._lock:
            self._account_freed()
            if self._cache_count:
                self.budget.take(self._session_items, self._advise, "another session")
            self._cache_count += 1
            try:
                self._fit_slab()  # only now: what the cache does not use yet is lent
                # What slots borrow must be touched page by page.
                huge = not self._plan.streams
                cache = KvCache(self.spec, self.context, self.kv, huge=huge)
            except BaseException:
                self.free_kv()
                raise
            self._caches.add(cache)
            return cache

    def free_kv(self) -> None:
        """Says that a cache of `new_kv` is gone; called by the garbage collector, in any thread and
        in the middle of anything, so it waits for no lock: whoever holds it does the sums."""
        self._freed.append(None)
        if self._lock.acquire(blocking=False):
            try:
                self._account_freed()
            finally:
                self._lock.release()

    def _account_freed(self) -> None:
        while self._freed:
            self._freed.pop()
            self._cache_count -= 1
            if self._cache_count:
                self.budget.give_back(self._session_items)

    def promise_text(self, size: int) -> None:
        """Put what encoding `size` bytes takes into the budget, where it stays, as memory does."""
        with self._lock:
            more = (size - TEXT_BYTES) * ENCODING_BYTES - self._text_promise
            if more > 0:
                item = Item(f"encoding text ({show_size(size)})", more)
                self._promise([item], f"encoding {show_size(size)} of text", self._advise_text)
                self._text_promise += more

    def promise_all_logits(self) -> None:
        """Put the logits of a whole chunk (the model's and the reader's) into the budget, once."""
        with self._lock:
            if not self._all_logits_promised:
                size = 2 * 4 * self.logits_tokens * self.spec.vocab_size
                self._promise([Item("logits of every position", size)], "logits")
                self._all_logits_promised = True

    def _check_open(self) -> None:
        if self._model is None:
            raise ValueError("the engine is closed")

    def _advise_text(self, items: Sequence[Item], spare: int) -> list[str]:
        fits = show_size(self.text_room())
        needed = self.budget.promised + sum(item.bytes for item in items)
        return [
            f"a text of {fits} would fit: shorten it (for perplexity: --limit)",
            *advise_memory(needed),
        ]
