"""The elastic slab: what others do not use yet holds bundles, and goes back when they need it."""

import contextlib
import mmap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import streaming

import edgemem
from edgemem import dtypes, inventory
from edgemem._native import ffi, lib
from edgemem.budget import current_bytes
from edgemem.engine import Engine
from edgemem.kernels import Array, Core
from edgemem.models.workspace import LEND_AFTER_STEPS, ScratchLoan, scratch_bytes

CONTEXT = 512
RESERVE_BYTES = 1 << 20


@pytest.fixture(scope="module")
def resident(tiny_moe_store):
    with edgemem.load(tiny_moe_store, context=CONTEXT) as engine:
        yield engine


@pytest.fixture
def engine(tiny_moe_store, resident, monkeypatch):
    """In a budget for what must be there, the reserve, and a third of what may stream."""
    items, bundles = resident.budget._items, inventory.plannable(resident.store)
    streamed = int(bundles.sizes[bundles.may_stream].sum())
    dense = int(bundles.sizes.sum()) - streamed
    limit = sum(item.bytes for item in items[:4]) + dense + streamed // 3
    monkeypatch.setattr("edgemem.needs.current_bytes", lambda: items[0].bytes)
    # A step of few tokens, so that scratch is what it was in the engine that streams nothing.
    monkeypatch.setattr("edgemem.needs.LARGE_CHUNK_TOKENS", resident.chunk_tokens)
    monkeypatch.setattr("edgemem.needs.STREAMING_RESERVE_BYTES", RESERVE_BYTES)
    limit += 2 * RESERVE_BYTES
    with edgemem.load(tiny_moe_store, memory=limit, context=CONTEXT) as engine:
        assert len(engine._plan.streamed)
        yield engine


def slab_bytes(engine: Engine) -> int:
    pairs = zip(engine._plan.classes.tolist(), engine._plan.each.tolist(), strict=True)
    return sum(engine.slots[layout] * size for layout, size in pairs)


def others_bytes(engine: Engine) -> int:
    """What everything but the slab may have now."""
    unused = max(1, engine._cache_count) * engine._kv_item.bytes
    unused -= sum(cache.bytes - cache.unused_bytes for cache in engine._caches)
    return engine.budget.promised - engine._plan.least_bytes - unused - engine._scratch_loan.bytes


def assert_within(engine: Engine) -> None:
    total = slab_bytes(engine) + others_bytes(engine)
    assert total <= engine.budget.limit, "the budget is exceeded"
    largest = int(engine._plan.each.max()) * len(engine._plan.each)
    room = min(engine.budget.limit - total, engine._plan.counts @ engine._plan.each)
    assert room <= RESERVE_BYTES + largest, "memory lies idle"


def test_a_cache_that_fills_takes_its_memory_from_the_slab(engine, resident):
    ids = np.random.default_rng(1).integers(0, engine.spec.vocab_size, CONTEXT)
    before = slab_bytes(engine)
    with engine.session() as session, resident.session() as expected:
        for start in range(0, CONTEXT, 32):
            part = ids[start : start + 32]
            assert session.feed(part).tobytes() == expected.feed(part).tobytes()
            assert_within(engine)
    full = slab_bytes(engine)
    assert before - full >= engine._kv_item.bytes // 2
    with engine.session() as session:
        session.feed(ids[:1])
        assert full < slab_bytes(engine) <= before, "what was freed is lent again"
        assert_within(engine)


def test_scratch_of_large_steps_is_lent_after_many_small_ones(resident):
    loan, trimmed = ScratchLoan(resident.spec, 512, threads=2), []

    def expect(n: int) -> tuple[int, int]:
        loan.expect(n, trimmed.append)
        return loan.tokens, loan.bytes

    least, most = loan.tokens, loan.bytes
    assert least == 8 and 0 < most < scratch_bytes(resident.spec, 512, 2)
    assert expect(512) == (512, 0)
    assert {expect(1) for _ in range(LEND_AFTER_STEPS - 1)} == {(512, 0)} and not trimmed
    assert expect(1) == (least, most) == expect(1) and trimmed == [least]
    tokens, some = expect(20)
    assert tokens == 32 and 0 < some < most
    assert [expect(n) for n in (1, 20, 1)] == [(32, some)] * 3, "it counts steps in a row"
    assert trimmed == [least]


def test_scratch_is_lent_only_once_it_is_trimmed(resident):
    loan = ScratchLoan(resident.spec, 512, threads=2)
    loan.expect(512, None)
    for _ in range(LEND_AFTER_STEPS - 1):
        loan.expect(1, None)

    def interrupted(tokens: int) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            loan.expect(1, interrupted)
        assert (loan.tokens, loan.bytes) == (512, 0)
    trimmed = []
    loan.expect(1, trimmed.append)
    assert trimmed == [8] and loan.bytes > 0


def test_what_is_trimmed_goes_back_to_the_system(tiny_moe_store, monkeypatch):
    """Dropped pages read as zeros; a core's scratch is seen in the process's memory."""
    monkeypatch.setattr("edgemem.models.workspace.LEND_AFTER_STEPS", 1)
    ids = np.arange(128) % 64
    with streaming.opened(tiny_moe_store, 0.3) as engine, engine.session() as session:
        arrays = vars(engine._model._work.scratch)
        session.feed(ids)
        chunk, kept = engine.chunk_tokens, 8
        for name in ("x", "h", "q", "k", "v", "attended", "ahead"):
            rows = arrays[name].array
            page = -(-mmap.PAGESIZE // rows[0].nbytes)
            assert rows[kept + page : chunk].any(), name
        session.feed(ids[:1])
        for name in ("x", "h", "q", "k", "v", "attended", "ahead"):
            rows = arrays[name].array
            page = -(-mmap.PAGESIZE // rows[0].nbytes)
            assert not rows[kept + page : chunk - page].any(), name
    core, tokens, cols = Core(1), 4096, 4096
    size = lib.em_linear_scratch(tokens, cols)
    core.reserve(size)
    x, quants = Array((tokens, cols)), Array(1)
    x.array[:] = 1
    weights = np.zeros(1 << 16, np.uint8)
    linear = ffi.new("em_linear *", {
        "weights": ffi.from_buffer(weights), "out": quants.pointer, "out_stride": 0,
        "dtype": dtypes.Q8_0.code, "rows": 1, "cols": cols,
    })  # fmt: skip
    assert lib.em_linears(core.handle, linear, 1, x.pointer, tokens) == lib.EM_OK
    touched = current_bytes()
    core.trim(1 << 20)
    assert current_bytes() <= touched - 0.8 * size


@pytest.mark.parametrize("place", ["edgemem.streamer._certain", "edgemem.residency.pointer"])
def test_an_interrupt_while_slots_change_leaves_the_budget_kept(
    place, engine, resident, monkeypatch
):
    """What an interrupted change left is set right by the next step, also if it wants the slots
    that there were before."""
    monkeypatch.setattr("edgemem.models.workspace.LEND_AFTER_STEPS", 1)
    ids, residency, changed = np.arange(128) % 64, engine._streamer._residency, 0
    with engine.session() as session, resident.session() as expected:
        engine._caches.clear()  # so that room depends on the steps alone
        for count, other in ((40, 1), (1, 40), (40, 1)):
            for _ in range(2):
                assert session.feed(ids[:count]).tobytes() == expected.feed(ids[:count]).tobytes()
            before = dict(residency.slots)
            with monkeypatch.context() as patch:
                patch.setattr(place, interrupt)
                with contextlib.suppress(KeyboardInterrupt):
                    engine._scratch_loan.expect(other, engine._model.trim)
                    engine._fit_slab()
            changed += residency.slots != before
            assert session.feed(ids[:count]).tobytes() == expected.feed(ids[:count]).tobytes()
            assert engine.slots == engine._plan.slots(engine._slab_room()) == residency.slots
            assert set(residency.room.tolist()) == set(residency.slots.values())
    assert changed == (3 if place.endswith("_certain") else 0), "the interrupt came elsewhere"


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_what_was_trimmed_is_used_again(tiny_moe_store, resident, monkeypatch):
    """Long and short steps in turn, with scratch given back before every short one."""
    monkeypatch.setattr("edgemem.models.workspace.LEND_AFTER_STEPS", 1)
    rng = np.random.default_rng(3)
    with streaming.opened(tiny_moe_store, 0.3) as engine, engine.session() as session:
        with resident.session() as expected:
            for count in (1, 100, 1, 1, 30, 2, 128, 7, 9, 1):
                ids = rng.integers(0, engine.spec.vocab_size, count)
                assert session.feed(ids).tobytes() == expected.feed(ids).tobytes()


def test_sessions_take_what_they_fill_and_are_refused_in_the_end(engine, resident):
    ids = np.random.default_rng(2).integers(0, engine.spec.vocab_size, CONTEXT)
    expected = resident.session().feed(ids).tobytes()
    sessions = []
    with pytest.raises(edgemem.BudgetError, match="another session"):
        while True:
            sessions.append(engine.session())
            assert sessions[-1].feed(ids).tobytes() == expected
            assert_within(engine)
    assert len(sessions) > 1
    for session in sessions[1:]:
        session.close()
    assert sessions[0].feed is not None
    with engine.session() as again:
        assert again.feed(ids).tobytes() == expected
        assert_within(engine)


def test_a_session_that_holds_nothing_costs_no_slots(engine):
    ids = np.random.default_rng(5).integers(0, engine.spec.vocab_size, 32)
    with engine.session() as session:
        session.feed(ids)
        before = slab_bytes(engine)
        lost = 4 * engine.spec.vocab_size + int(engine._plan.each.sum())
        with engine.session():
            assert slab_bytes(engine) >= before - lost
            assert_within(engine)


def test_logits_borrow_from_the_slab_and_give_back(engine, resident):
    ids = np.random.default_rng(3).integers(0, engine.spec.vocab_size, 64)
    before = slab_bytes(engine)
    assert engine.logits(ids).tobytes() == resident.logits(ids).tobytes()
    lent = 4 * engine.spec.vocab_size * len(ids)
    assert slab_bytes(engine) <= before - lent
    with engine.session() as session:
        session.feed(ids[:1])
        assert slab_bytes(engine) > before - lent
        assert_within(engine)


def test_short_memory_costs_slots_and_is_in_the_trace(engine, resident):
    ids = np.random.default_rng(4).integers(0, engine.spec.vocab_size, 40)
    before = slab_bytes(engine)
    withheld = (before - engine._plan.least_bytes) // 2
    engine._governor.withheld = lambda most: withheld
    with engine.session() as session, resident.session() as expected:
        assert session.feed(ids).tobytes() == expected.feed(ids).tobytes()
    assert slab_bytes(engine) <= before - withheld
    assert engine.trace.summary()["prefill"]["withheld_bytes"] == withheld
    assert engine.trace.recent[-1].withheld_bytes == withheld


def test_whoever_waits_while_the_engine_closes_learns_of_it(engine):
    with ThreadPoolExecutor(1) as pool:
        with engine._lock:
            waiting = pool.submit(engine.logits, [1, 2, 3])
            time.sleep(0.2)
            engine.close()
        with pytest.raises(ValueError, match="closed"):
            waiting.result()
