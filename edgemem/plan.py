"""What a store does inside a budget, told before it is loaded: what stays, how fast tokens come.

A decoded token takes flash I/O, memory management and computing (arXiv 2312.11514). Weights and
keys are read once at the pace of memory; what is missed comes at the pace of flash, and how much
that is follows from the slots, by kind:

* layers that all tokens take come in turns: all slots but those in transit hit each time;
* of experts some are popular: what a cache of a share x of them misses falls like exp(-9.5 x): 39,
  28 and 9 % at x = 10, 13.5 and 25 %. Runs of Qwen3-30B-A3B's shape read 25 and 15 % at 14 and 20;
  in recorded texts the default policy misses 40, 31, 14 % (qwen), and 40, 34, 22 % (gpt-oss);
* of neurons a token wants few, mostly those of the tokens before: with room for r times as many it
  misses 1 / (1 + (r / 1.5)²): 50, 36, 8, 4 % at r = 1.5, 2, 5, 7 (bench/LOG.md).

Reads go on while products are computed, but not all: `_together`. How many experts a layer lacks
changes from token to token, so that now computing waits for flash, now flash for computing:
`_by_turns`. The constants were fitted to what runs took (bench/LOG.md); the paces are this device's
(doctor.py).
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from math import ceil, exp, lgamma, log, sqrt

import numpy as np

from . import inventory, residency, rows, streamer
from .arguments import MAX_THREADS, check_count, check_kv, check_predict, check_sparse
from .benchmark import NEW_TOKENS, PROMPT_TOKENS, Report
from .benchmark import check as check_tokens
from .budget import Budget, Item, fast_cpus
from .doctor import Device
from .format import Kind
from .kvcache import token_bytes
from .needs import Needs
from .planner import Plan
from .store import Store
from .tokenizer import Tokenizer

EXPERT_DECAY = 9.5
NEURON_SHARE = 0.03
"""Of neurons, what one token wants, where a store does not say (OPT-6.7B: 3 %; others up to 20)."""
NEURON_WINDOW = 1.5
"""With room for so many times what a token wants, half of that is there (bench/LOG.md)."""
IN_TRANSIT = 1 + streamer.AHEAD
"""Slots of layers that come in turns which hold what is used now, or next."""
PRODUCT_SHARE = 0.9
"""Of the pace of a plain read of memory, what products reach."""
STEP_SECONDS, LAYER_SECONDS = 0.3e-3, 10e-6
"""Python's part of a step, and what each layer adds."""
TURN_SECONDS, FORESEEING_SECONDS = 20e-6, 60e-6
"""Taking the bundles of a layer that streams; where it is routed, asking the next one's router."""
NEURON_SECONDS = 0.3e-6
"""Finding one neuron that comes and goes, and gathering it."""


@dataclass(frozen=True)
class Expectation:
    """One decoded token: seconds of its parts, and of all, in which some of them are done together;
    `read_bytes` come from flash, `hit_rate` is of bundles (and neurons) that stream, None where
    nothing does."""

    flash_seconds: float
    management_seconds: float
    compute_seconds: float
    seconds: float
    tokens_per_second: float
    read_bytes: float
    hit_rate: float | None


@dataclass(frozen=True)
class Outlook:
    """What a budget makes of a store. `items` are the lines of the sum; `slots` are for
    `streamed_bundles`, and `neuron_room` for the `neurons` of each layer (0: it has none that come
    and go). `expected` is None without a device's figures."""

    budget_bytes: int
    context: int
    kv: str
    threads: int
    items: tuple[Item, ...]
    resident_bytes: int
    streamed_bytes: int
    streamed_bundles: int
    slots: int
    neurons: int
    neuron_room: int
    slab_bytes: int
    chunk_tokens: int
    expected: Expectation | None


def look(
    path: str | os.PathLike, memory: str | int = "auto", context: int | None = None,
    threads: int | None = None, kv: str = "f16", *, predict: bool = False, sparse: bool = False,
    prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS,
    device: Device | None = None,
) -> Outlook:  # fmt: skip
    """What `edgemem.load` would do with the same arguments, and how long a token would take in the
    middle of `new_tokens` after a prompt; `context` is by default that of the two.

    Reads no weights. Raises StoreError for what is wrong with the store; BudgetError, with the sum,
    where it does not fit; ValueError or TypeError for arguments.
    """
    check_count("context", context)
    check_count("threads", threads, MAX_THREADS)
    check_kv(kv)
    threads = min(fast_cpus(), MAX_THREADS) if threads is None else int(threads)
    budget = Budget(memory)
    with Store.open(path) as store:
        check_predict(store, predict)
        check_sparse(store, sparse, predict)
        # As an engine does, before it looks what the process has; and be as large as one.
        importlib.import_module(".engine", __package__)
        _ = Tokenizer(store.tokenizer_json, store.tokenizer_config)
        length = context or prompt_tokens + new_tokens
        needs = Needs(store, budget.limit, length, threads, kv, predict, sparse)
        check_tokens(needs, prompt_tokens, new_tokens, 1)
        budget.take(needs.items, lambda items, spare: needs.advise(budget, items, spare))
        return outlook(needs, budget, prompt_tokens, new_tokens, device)


def outlook(
    needs: Needs, budget: Budget, prompt_tokens: int, new_tokens: int,
    device: Device | None,
) -> Outlook:  # fmt: skip
    """What `look` tells, where the needs of an open store have been taken from the budget."""
    store = needs.store
    tokens = prompt_tokens + new_tokens // 2
    plan, slots = needs.plan, needs.expected_slots(budget.spare, prompt_tokens, new_tokens // 2)
    sizes = store.entries["page_count"].astype(np.int64) * store.page_size
    whole = [slots[layout] for layout in plan.classes[~plan.comes_apart].tolist()]
    apart = [slots[layout] for layout in plan.classes[plan.comes_apart].tolist()]
    return Outlook(
        budget_bytes=budget.limit, context=needs.context, kv=needs.kv, threads=needs.threads,
        items=tuple(needs.items), resident_bytes=plan.resident_bytes,
        streamed_bytes=int(sizes[plan.streamed].sum() + sizes[plan.apart].sum()),
        streamed_bundles=len(plan.streamed), slots=sum(whole),
        neurons=store.spec.intermediate if apart else 0, neuron_room=max(apart, default=0),
        slab_bytes=int(plan.each @ np.array(list(slots.values()), np.int64)),
        chunk_tokens=needs.chunk_tokens,
        expected=device and expect(needs, slots, tokens, device),
    )  # fmt: skip


def hindsight(device: Device, expected: Expectation, report: Report) -> Device:
    """The device with memory as fast as was measured beside runs, and flash as much faster or
    slower as it was in them than `expected`; as doctor found it where nothing was read."""
    found, flash = report.decode.device_bytes_per_second, 1.0
    if found and expected.read_bytes:
        flash = found * expected.flash_seconds / expected.read_bytes
    return device.paced(report.dram_bytes_per_second, flash)


def expect(needs: Needs, slots: dict[int, int], tokens: int, device: Device) -> Expectation:
    """How long a token takes after so many others, on a device, with the default policy and slots
    of each layout class."""
    store, plan, use = needs.store, needs.plan, _use(needs)
    compute = _compute_seconds(needs, use, tokens, device)
    alone = _compute_seconds(needs, use * (store.entries["kind"] == Kind.HEAD), 0, device)
    streams = [
        _stream(needs, index, slots[layout], device)
        for index, layout in enumerate(plan.classes.tolist())
    ]
    flash = sum(s.seconds for s in streams)
    management = _management_seconds(store, plan, use)
    seconds = management + _together(streams, compute, alone)
    wanted = sum(s.wanted for s in streams)
    missed = sum(s.missed for s in streams)
    return Expectation(
        flash_seconds=flash, management_seconds=management, compute_seconds=compute,
        seconds=seconds, tokens_per_second=1 / seconds,
        read_bytes=sum(s.read_bytes for s in streams),
        hit_rate=1 - missed / wanted if wanted else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Stream:
    """The bundles (or neurons) of one layout class: how many a token wants, how many of those it
    misses, and what reading them takes. `serial` is the share of the lesser of computing and
    reading that is not done meanwhile. With `chances` that follows from them, the turns in which
    bundles are missed by chance; and nothing is read while the output head computes."""

    wanted: float
    missed: float
    read_bytes: float
    seconds: float
    serial: float
    chances: int = 0


def _stream(needs: Needs, index: int, slots: int, device: Device) -> _Stream:
    store, plan = needs.store, needs.plan
    layout, each, count = (int(a[index]) for a in (plan.classes, plan.each, plan.counts))
    bundles = np.flatnonzero(store.entries["layout"] == layout)
    if plan.comes_apart[index]:
        share = _neuron_share(needs)
        return _neurons(store, len(bundles), each // len(bundles), count, slots, share, device)
    kind, wanted = store.entries["kind"][bundles[0]], float(plan.demand[index])
    share, serial = _missed(kind, slots, count, store.spec.top_k)
    missed = share * wanted
    # What a turn lacks is asked for at once, as far as there is room for it.
    turns = len(np.unique(inventory.turns(store)[bundles]))
    at_once = max(1.0, min(missed / turns, slots // 2)) * -(-each // residency.PIECE_BYTES)
    size, depth = min(each, residency.PIECE_BYTES), min(at_once, residency.DEPTH)
    seconds = missed * each / device.flash_rate(size, depth)
    chances = turns if kind == Kind.EXPERT else 0
    return _Stream(wanted, missed, missed * each, seconds, serial, chances)


def _missed(kind: int, slots: int, count: int, top_k: int) -> tuple[float, float]:
    """The share of what is wanted of `count` bundles that is not in slots, and `serial`."""
    if slots >= count:
        return 0.0, 0.0
    if kind == Kind.EXPERT:
        held, none = max(0, slots - top_k) / count, exp(-EXPERT_DECAY)
        return (exp(-EXPERT_DECAY * held) - none) / (1 - none), 0.0
    if kind == Kind.FFN:
        hits = max(0, slots - IN_TRANSIT) / max(1, count - IN_TRANSIT)
        return 1 - hits, max(0.0, hits - streamer.AHEAD / count)
    if kind == Kind.HEAD:  # one turn, in which what was read first leaves first
        return 1.0, 0.0
    return 1 - slots / count, 1.0


def _neurons(
    store: Store, sets: int, row_bytes: int, count: int, slots: int, share: float, device: Device
) -> _Stream:  # fmt: skip
    """Of each of some sets `count` rows: a token wants a share, and there is room for some."""
    wanted = share * count
    missed = wanted / (1 + (slots / (NEURON_WINDOW * wanted)) ** 2) if slots < count else 0.0
    page = store.page_size
    size = -(-row_bytes // page) * page + page * (row_bytes % page > 0)
    read = sets * missed * size
    return _Stream(
        sets * wanted, sets * missed, read, read / device.flash_rate(size, rows.DEPTH), 1.0
    )


def _neuron_share(needs: Needs) -> float:
    """Of neurons, what one token wants: all where none rest, else as was found when the store was
    calibrated."""
    if not (needs.spec.rests or needs.sparse):
        return 1.0
    found = (("predictor", "active"), ("sparse", "active"))
    if needs.predict or needs.sparse:
        found = (("predictor", "predicted") if needs.predict else ("sparse", "used"),)
    for work, name in found:
        try:
            share = float(needs.store.recipe[work][name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if 0 < share <= 1:
            return share
    return NEURON_SHARE


def _together(streams: list[_Stream], compute: float, alone: float) -> float:
    """Seconds in which all is computed, `alone` of it in the output head, and read."""
    read = sum(s.seconds for s in streams)
    if not read:
        return compute
    alone *= sum(s.seconds for s in streams if s.chances) / read
    beside = compute - alone
    serial = sum(s.serial * s.seconds for s in streams) / read * min(beside, read)
    for s in streams:
        if s.chances and s.missed:
            own = beside * s.seconds / read
            serial += _by_turns(own, s.seconds, s.missed, s.chances) - max(own, s.seconds)
    return alone + max(beside, read) + serial


def _by_turns(compute: float, read: float, missed: float, turns: int) -> float:
    """Seconds of some turns, each of which takes what its part of the computing takes, or reading
    what it lacks, whichever is longer: of all `missed` a number by chance (Poisson's)."""
    mean = missed / turns
    lacks = np.arange(ceil(mean + 10 * sqrt(mean) + 10))
    chance = np.array([exp(k * log(mean) - mean - lgamma(k + 1)) for k in lacks.tolist()])
    return turns * float(chance @ np.maximum(compute / turns, lacks * (read / missed)))


def _use(needs: Needs) -> np.ndarray:
    """float64 [n_bundles]: the share of each bundle that a token reads of memory."""
    store, kinds = needs.store, needs.store.entries["kind"]
    use = inventory.plannable(store).use.copy()
    use[kinds == Kind.EMBED] = 0  # a row
    use[kinds == Kind.NEURONS] = _neuron_share(needs)
    use[inventory.left_out(store, needs.predict)] = 0
    return use


def _compute_seconds(needs: Needs, use: np.ndarray, tokens: int, device: Device) -> float:
    """Reading weights and keys and values once, or multiplying, whichever takes longer."""
    store, spec = needs.store, needs.spec
    weights = float(use @ store.entries["payload_bytes"])
    counts = inventory.multiply_adds(store, use)
    multiplying = sum(n / device.multiply_adds[name] for name, n in counts.items())
    seen = sum(min(tokens, window or tokens) for window in spec.windows)  # of all layers
    read = weights + seen * token_bytes(spec, needs.kv) / spec.n_layers
    return max(read / (PRODUCT_SHARE * device.dram_bytes_per_second), multiplying)


def _management_seconds(store: Store, plan: Plan, use: np.ndarray) -> float:
    """What is neither reading nor products."""
    spec, kinds = store.spec, store.entries["kind"]
    seconds = STEP_SECONDS + LAYER_SECONDS * spec.n_layers
    turns = len(np.unique(inventory.turns(store)[plan.streamed]))
    routed = sum(spec.routed) if (kinds[plan.streamed] == Kind.EXPERT).any() else 0
    neurons = float(use[plan.apart].sum()) * spec.intermediate
    seconds += TURN_SECONDS * turns + FORESEEING_SECONDS * routed
    return seconds + NEURON_SECONDS * neurons
