"""How fast a model runs inside its budget, and how fast it could: the numbers of `edgemem bench`.

A repetition is a session of its own: a prompt of random tokens, then as many single-token steps as
are asked for, which feed more tokens of the same list. Not the model's own choices: greedy text
falls into a loop, whose experts stay. Each repetition starts from empty slots, like a first run,
unless `warm`; then one that is not counted comes before, and what it left stays.

The ideal is what the hardware allows for the same demand: all weights that a token takes are read
from DRAM once, and from flash those that the best of all caches (belady.py) would have missed, at
the rates that this process measures itself, the one in parallel to the other. η is the time of that
over the time that was measured. Flash is as fast as a plain read of it right after the run, or as
it was in the run, if that was more: shared devices change by the second, and one that is slow
afterwards must not flatter the run.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from . import belady, inventory
from ._native import isa_names
from .budget import Item, machine_bytes, peak_bytes, usable_cpus
from .format import Kind
from .rates import dram_rate, flash_rate, layout_classes, row_rate
from .sequence import TokenSequence

if TYPE_CHECKING:
    from .demand import DemandLog
    from .engine import Engine

PROMPT_TOKENS, NEW_TOKENS, REPETITIONS = 512, 128, 3
ROWS_WRITTEN = 4 << 20
"""Rows whose demand is written down for Belady, at most."""


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated measurements, all in one unit."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class PhaseReport:
    """Prefill or decode. Rates are of repetitions, all else of all of them together.

    `hit_rate` is None where nothing streams; what was read ahead in time counts as a hit, so
    that it may exceed Belady's, who reads nothing ahead. Shares are of the seconds: those in which
    products waited for bundles, and in which the device read at all; in these it gave
    `device_bytes_per_second`, 0 where there were none.
    """

    tokens_per_second: Spread
    demand_bytes_per_token: float
    read_bytes_per_token: float
    hit_rate: float | None
    stall_share: float
    device_share: float
    device_bytes_per_second: float


@dataclass(frozen=True)
class Report:
    """What was measured on one engine; sizes in bytes, times in seconds, rates per second.

    `slots`, as many as there were at the end, are for `streamed_bundles`, and `neuron_room` is for
    the `neurons` of a layer, where its FFN comes apart (else 0). The rates of flash (at reads of
    `record_bytes`, and of neurons) and DRAM are those that `ideal_seconds_per_token` of decode is
    made of;
    `efficiency` is η, of the median repetition. Of flash, and of Belady, there is nothing to say
    (None) where nothing streams. `breakdown` tells what the seconds of a decoded token went into,
    all of them: "all else" is what no counter has, most of it Python's. What native code calls back
    (policies that are not native, a trace) is in "taking bundles".
    """

    budget_bytes: int
    context: int
    kv: str
    predict: bool
    sparse: bool
    threads: int
    isa: str
    io_engine: str
    policy: str
    lookahead: bool
    warm: bool
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    load_seconds: float
    load_bytes_per_second: float
    resident_bytes: int
    streamed_bytes: int
    streamed_bundles: int
    slots: int
    neurons: int
    neuron_room: int
    slab_bytes: int
    prefill: PhaseReport
    decode: PhaseReport
    first_token_seconds: Spread
    belady_hit_rate: float | None
    record_bytes: int | None
    flash_bytes_per_second: float | None
    neurons_bytes_per_second: float | None
    dram_bytes_per_second: float
    ideal_seconds_per_token: float
    efficiency: float
    peak_rss_bytes: int
    breakdown: dict[str, float]


def measure(
    engine: Engine, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS,
    repetitions: int = REPETITIONS, *, warm: bool = False, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """Measure an engine that was just loaded and has run nothing yet.

    A trace that it records is of the first repetition, or of all if `warm`. `progress(done_tokens,
    total_tokens)` is called between steps. Raises what `check` raises, before any work.
    """
    check(engine, prompt_tokens, new_tokens, repetitions)
    rounds, length = repetitions + warm, prompt_tokens + new_tokens
    steps = _chunks(engine, prompt_tokens) + [1] * new_tokens
    steps_at_once = steps * rounds if warm else steps
    size = 4 * sum(_demand_room(engine, steps * rounds) + _rows_room(engine, steps * rounds))
    record = Item("record of the demand", size)
    engine._promise([record], "measuring")
    # Not numpy's generators: importing them takes memory that no budget has promised.
    draw, vocab = random.Random(seed), range(engine.spec.vocab_size)
    times, demands, spent = [], [], Counter()
    for i in range(rounds):
        row = np.array(draw.choices(vocab, k=length), np.int32)
        times.append(np.zeros(1 + new_tokens))
        if i and not warm:
            engine.clear()
        if i == 0 or not warm:
            demands.append(_Demand(engine, steps_at_once))
        counts = i >= warm
        if i == warm:  # from here on it counts
            engine.trace.clear()
        before = Counter()
        for step, seconds in enumerate(_steps(engine, row, prompt_tokens, demands[-1], counts)):
            times[i][step] = seconds
            if step == 0:
                before = _spent(engine)
            if progress is not None:
                progress(i * length + prompt_tokens + step, rounds * length)
        if counts:
            spent.update(_spent(engine))
            spent.subtract(before)
    engine._streamer.end_recording()
    report = _report(engine, prompt_tokens, np.array(times[warm:]), demands, warm, spent)
    engine.budget.give_back([record])
    return report


def _chunks(engine: Engine, tokens: int) -> list[int]:
    """The steps that a prompt takes."""
    chunk = engine.chunk_tokens
    return [chunk] * (tokens // chunk) + [tokens % chunk] * (tokens % chunk > 0)


def _spent(engine: Engine) -> Counter[str]:
    """Seconds that all steps so far have spent, by what they did; the rest is Python's."""
    clocks, waited = engine._core.clocks(), engine._streamer.statistics().get("stall_us", 0)
    spent = engine._model.spent()
    spent["waiting for bundles"] = clocks["stall"] + waited / 1e6
    spent["taking bundles"] = clocks["taking"]
    spent["foreseeing bundles"] = clocks["foreseeing"]
    return spent


def check(engine: Engine, prompt_tokens: int, new_tokens: int, repetitions: int) -> None:
    """Raise ValueError for what `measure` cannot do; needs no weights."""
    for name, value in (
        ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repetitions", repetitions)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if prompt_tokens + new_tokens > engine.context:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} more do not fit the context of "
            f"{engine.context} tokens; ask for fewer, or for a larger context"
        )


def _steps(engine: Engine, ids: np.ndarray, prompt_tokens: int, demand: _Demand, counts: bool):
    """Run one repetition; yields the seconds of the prompt, then of each token."""
    sequence = TokenSequence(engine)
    try:
        started = perf_counter()
        sequence.extend(ids[:prompt_tokens])
        int(sequence.logits().argmax())
        seconds = perf_counter() - started
        demand.end_step(False)
        yield seconds
        for token in ids[prompt_tokens:].tolist():
            started = perf_counter()
            sequence.append(token)
            sequence.logits()
            seconds = perf_counter() - started
            demand.end_step(counts)
            yield seconds
    finally:
        sequence.close()


class _Demand:
    """What streamed turns of some repetitions demand, for Belady: written down by native code.

    `end_step` says whether the turns since the last one count. `stretches` are of the bundles, and
    of the rows of those that come apart.
    """

    def __init__(self, engine: Engine, steps: Sequence[int]):
        logs = [engine._streamer.write_down(*_demand_room(engine, steps))]
        if engine._streamer.rows is not None:
            logs.append(engine._streamer.rows.write_down(*_rows_room(engine, steps)))
        self.stretches = [_Stretch(log) for log in logs]

    def end_step(self, counts: bool) -> None:
        for stretch in self.stretches:
            stretch.end_step(counts)


class _Stretch:
    """One log, and which of its turns count."""

    def __init__(self, log: DemandLog):
        self._log = log
        self._ends, self._counted = array("I"), array("B")

    def end_step(self, counts: bool) -> None:
        self._ends.append(self._log.n_turns)
        self._counted.append(counts)

    @property
    def n_steps(self) -> int:
        return len(self._ends)

    @property
    def is_whole(self) -> bool:
        """Whether there was room for all; without it Belady is not asked, and η is at least what is
        said."""
        return self._log.is_whole

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self._log.counts, dtype=np.int64)])

    @property
    def ids(self) -> np.ndarray:
        return self._log.indices.astype(np.int64)

    @property
    def counted(self) -> np.ndarray:
        return np.repeat(np.frombuffer(self._counted, bool), np.diff(self._ends, prepend=0))

    @property
    def slots(self) -> np.ndarray:
        starts, slots = zip(*self._log.resized, strict=True)
        return np.repeat(slots, np.diff([*starts, self._log.n_turns]), axis=0)


def _rows_room(engine: Engine, steps: Sequence[int]) -> tuple[int, int]:
    """Likewise, of rows; of many, fewer than all steps could demand."""
    rows = engine._streamer.rows
    if rows is None:
        return 0, 0
    counts = rows.row_counts
    return min(sum(counts) * len(steps), ROWS_WRITTEN), len(counts) * len(steps)


def _demand_room(engine: Engine, steps: Sequence[int]) -> tuple[int, int]:
    """How many bundles, and how many turns, steps of so many tokens demand at most."""
    streamed = engine._plan.streamed
    turns = inventory.turns(engine.store)[streamed]
    _, first, there = np.unique(turns, return_index=True, return_counts=True)
    head = engine.store.entries["kind"][streamed][first] == Kind.HEAD
    # All of the head's, and of others no more than the tokens want of the turn.
    each = inventory.plannable(engine.store, predict=engine.predict).at_once[streamed][first]
    each = np.where(head, there, each)
    times = 1 + head * engine.spec.tied  # embeddings are rows of a tied head
    most = sum(int((times * np.minimum(there, each * tokens)).sum()) for tokens in steps)
    return most, len(steps) * int(times.sum())


def _report(
    engine: Engine, prompt_tokens: int, times: np.ndarray, demands: list[_Demand], warm: bool,
    spent: Counter[str],
) -> Report:  # fmt: skip
    """`times` are seconds, float64 [repetitions, 1 + new_tokens]: of the prompt, of each token."""
    residency, plan, how = engine._streamer._residency, engine._plan, engine._streaming
    new_tokens = times.shape[1] - 1
    seconds, peak = times[:, 1:].sum(axis=1), peak_bytes()
    best = _belady(engine, demands)
    summary = engine.trace.summary()
    decode = _phase(summary["decode"], new_tokens / seconds)
    dram = dram_rate(engine)
    record, flash = flash_rate(engine) if len(plan.streamed) else (None, None)
    turns = [stretch for demand in demands for stretch in demand.stretches[1:]]
    of_rows = row_rate(engine, _mean_share(engine, turns)) if turns else None
    # Where bundles alone were read, or rows alone, what the device gave then was theirs.
    if flash and not of_rows:
        flash = max(flash, decode.device_bytes_per_second)
    if of_rows and not flash:
        of_rows = max(of_rows, decode.device_bytes_per_second)
    missed = best.missed_bytes / flash if flash else 0.0
    missed += best.missed_row_bytes / of_rows if of_rows else 0.0
    ideal = max(decode.demand_bytes_per_token / dram, missed / (new_tokens * len(times)))
    spent["all else"] = float(seconds.sum()) - spent.total()
    return Report(
        budget_bytes=engine.budget.limit, context=engine.context, kv=engine.kv,
        predict=engine.predict, sparse=engine.sparse,
        threads=engine.threads, isa=engine.isa, io_engine=engine._streamer.io_engine,
        policy=how.policy, lookahead=how.lookahead, warm=warm,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, repetitions=len(times),
        load_seconds=engine.load_seconds,
        load_bytes_per_second=plan.resident_bytes / engine.load_seconds,
        resident_bytes=plan.resident_bytes,
        streamed_bytes=int(residency.sizes[plan.streamed].sum()),
        streamed_bundles=len(plan.streamed), slots=sum(engine._streamer.slots),
        neurons=engine.spec.intermediate if turns else 0,
        neuron_room=max(engine._streamer.rows.rooms) if turns else 0,
        slab_bytes=int(sum(plan.each * list(engine.slots.values()))),
        prefill=_phase(summary["prefill"], prompt_tokens / times[:, 0]), decode=decode,
        first_token_seconds=_spread(times[:, 0]), belady_hit_rate=best.hit_rate,
        record_bytes=record, flash_bytes_per_second=flash,
        neurons_bytes_per_second=of_rows, dram_bytes_per_second=dram,
        ideal_seconds_per_token=ideal,
        efficiency=ideal / (statistics.median(seconds) / new_tokens),
        peak_rss_bytes=peak,
        breakdown={doing: each / (new_tokens * len(times)) for doing, each in spent.items()},
    )  # fmt: skip


def _device_rate(summary: dict) -> float:
    """Bytes per second that the device gave while it read at all."""
    read, seconds = summary["read_bytes_per_token"] * summary["tokens"], summary["device_seconds"]
    return read / seconds if seconds else 0.0


def _phase(summary: dict, rates: Sequence[float]) -> PhaseReport:
    names = (
        "demand_bytes_per_token", "read_bytes_per_token", "hit_rate", "stall_share", "device_share"
    )  # fmt: skip
    found = {name: summary[name] for name in names}
    return PhaseReport(_spread(rates), **found, device_bytes_per_second=_device_rate(summary))


def _spread(values: Sequence[float]) -> Spread:
    values = list(map(float, values))
    return Spread(statistics.median(values), min(values), max(values))


@dataclass
class _Best:
    """What Belady's cache makes of the demand that counts."""

    hits: int = 0
    demanded: int = 0
    missed_bytes: int = 0
    missed_row_bytes: int = 0

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.demanded if self.demanded else None

    def add(
        self, stretch: _Stretch, classes: np.ndarray, sizes: np.ndarray, hits=belady.hits
    ) -> int:
        """Bytes that it misses of a stretch of demand: it began with empty slots, and the prompt
        filled them."""
        if not stretch.is_whole or not len(stretch.ids):
            return 0
        there = hits(stretch.starts, stretch.ids, classes, stretch.slots)
        counts = np.repeat(stretch.counted, np.diff(stretch.starts))
        self.hits += int(there[counts].sum())
        self.demanded += int(counts.sum())
        return int(sizes[stretch.ids[counts & ~there]].sum())


def _belady(engine: Engine, demands: list[_Demand]) -> _Best:
    residency, rows = engine._streamer._residency, engine._streamer.rows
    best, classes = _Best(), layout_classes(engine)
    sizes = residency.sizes[residency.streamed]
    for demand in demands:
        bundles, *apart = demand.stretches
        best.missed_bytes += best.add(bundles, classes, sizes)
        for stretch in apart:
            sets = np.repeat(np.arange(len(rows.row_counts)), rows.row_counts)
            row_sizes = np.repeat(rows.row_sizes, rows.row_counts)
            best.missed_row_bytes += best.add(stretch, sets, row_sizes, belady.row_hits)
    return best


def _mean_share(engine: Engine, stretches: list[_Stretch]) -> float:
    """Of a set's rows, those that a turn wants."""
    whole = [stretch for stretch in stretches if stretch.is_whole]
    if not whole:
        return inventory.NEURON_USE
    wanted = sum(len(stretch.ids) for stretch in whole)
    steps = sum(stretch.n_steps for stretch in whole)
    return wanted / steps / sum(engine._streamer.rows.row_counts)


def host() -> dict:
    """The machine, as far as it tells: cpu, cores, usable_cores, memory_bytes, system, isa."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cpus(),
        "memory_bytes": machine_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "isa": isa_names(),
    }


def cpu_name() -> str:
    """What the processor calls itself, or its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model n"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
