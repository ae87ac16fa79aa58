"""The law for streaming: budget, policy, lookahead, I/O engine, threads and chunks never change an
answer, nor do slots that come and go."""

import gc
import os
import signal
import time

import numpy as np
import pytest
import streaming
import tiny
from streaming import answer
from tiny import MODEL_TYPES
from tiny_families import FAMILIES

import edgemem
from edgemem import inventory, lookahead, policies, residency
from edgemem.format import Kind
from edgemem.models.decoder import Vocabulary
from edgemem.streamer import Streamer

POLICIES = [name for name in policies.POLICIES if name != "static"]
ENGINES = ("threads", "io_uring")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, convert_store, seed_base) -> dict[str, str]:
    """A random model of every type, at q4_0 or as it is, large enough to stream."""
    folder, made = tmp_path_factory.mktemp("streaming"), {}
    for i, kind in enumerate(MODEL_TYPES):
        for attempt in range(20):
            where = folder / f"{kind}-{attempt}"
            spec = tiny.write(where, kind, seed_base + 2000 + i + 100 * attempt).spec
            if kind not in FAMILIES or any(spec.routed) or spec.n_layers > 2:
                break
        made[kind] = str(convert_store(where, ("keep", "q4_0")[i % 2]))
    return made


def engine_or_skip(io_engine: str, path) -> None:
    try:
        with streaming.opened(path, 0.5, io_engine=io_engine):
            pass
    except edgemem.UnsupportedError as error:
        pytest.skip(f"no {io_engine} here: {error}")


@pytest.mark.parametrize("io_engine", ENGINES)
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_budget_gives_one_answer(kind, io_engine, stores):
    engine_or_skip(io_engine, stores[kind])
    with edgemem.load(stores[kind]) as engine:
        expected = answer(engine)
    ways = 0
    for share in (0.0, 0.2, 0.7):
        for policy in POLICIES:
            threads, chunk = 1 + ways % 3, (1, 5, None)[ways % 3]
            options = {"policy": policy, "threads": threads, "io_engine": io_engine}
            options["lookahead"] = ways % 2 == 0
            with streaming.opened(stores[kind], share, chunk, **options) as engine:
                assert streaming.streams(engine)
                assert answer(engine) == expected, (share, policy, threads, chunk)
                found = engine.trace.summary()["decode"]
                assert found["tokens"] == 0 or found["misses"] >= 0
            ways += 1


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_head_that_streams_changes_no_answer(kind, stores, monkeypatch):
    with edgemem.load(stores[kind]) as engine:
        expected = answer(engine)
    plannable = inventory.plannable
    monkeypatch.setattr(
        inventory, "plannable", lambda store, _=True, predict=False: plannable(store, True, predict)
    )
    with streaming.opened(stores[kind], 0.0) as engine:
        kinds = engine.store.entries["kind"][engine._plan.streamed]
        assert Kind.HEAD in kinds and answer(engine) == expected


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_slots_that_come_and_go_change_no_answer(kind, stores, seed_base):
    random = np.random.default_rng(seed_base)
    with edgemem.load(stores[kind]) as engine:
        expected = answer(engine)
    with streaming.opened(stores[kind], 0.9, 4) as engine:
        most, least = engine._slab_room(), engine._plan.least_bytes
        counts = set()

        def room():
            counts.add(sum(engine.slots.values()))
            return int(random.integers(least, most + 1))

        engine._slab_room = room
        assert answer(engine) == expected
        assert len(counts) > 1 or engine._plan.counts.sum() - engine._plan.least.sum() < 2


def test_what_is_foreseen_is_read_ahead(tiny_moe_store, monkeypatch):
    with edgemem.load(tiny_moe_store) as engine:
        expected = answer(engine)
    with monkeypatch.context() as patch:  # whatever time this device has
        patch.setattr(lookahead, "FIRST_PACE", 1e30)
        patch.setattr(lookahead, "LEAST_PRECISION", -1.0)
        with streaming.opened(tiny_moe_store, 0.2) as engine:
            assert answer(engine) == expected
            ahead = engine._streamer.statistics()
            assert ahead["useful_bytes"] > 0
    with streaming.opened(tiny_moe_store, 0.2, lookahead=False) as engine:
        assert answer(engine) == expected
        assert engine._streamer.statistics()["prefetch_bytes"] == 0


def test_without_direct_reads_the_answer_is_the_same(stores, monkeypatch):
    """Some file systems refuse them; reads then go through the page cache."""
    with edgemem.load(stores["qwen2_moe"]) as engine:
        expected = answer(engine)

    def buffered(path):
        return os.open(path, os.O_RDONLY), False

    monkeypatch.setattr(residency, "open_direct", buffered)
    with streaming.opened(stores["qwen2_moe"], 0.2) as engine:
        assert streaming.streams(engine) and answer(engine) == expected


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize("policy", ["next-use", "lru"])  # one that is native, one called back
def test_interrupted_steps_leave_the_engine_usable(stores, policy):
    """At the floor a pin that is left behind would end the engine."""

    class Interrupt(Exception):
        pass

    def interrupt(*_):
        raise Interrupt

    with edgemem.load(stores["qwen3_moe"]) as engine:
        expected = answer(engine)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with streaming.opened(stores["qwen3_moe"], 0.0, policy=policy) as engine:
            for i in range(60):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + i % 13))
                    answer(engine)
                except Interrupt:
                    pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert answer(engine) == expected
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("called_back", ["observe", "pause", "record"])
def test_what_is_raised_in_the_middle_of_a_step_ends_it_and_nothing_else(
    called_back, stores, tmp_path, monkeypatch
):
    """With all that it says, and without keeping the sequence that it ended."""
    with edgemem.load(stores["mixtral"]) as engine:
        expected = answer(engine)
    options = {"policy": "lfu", "trace": tmp_path / "x"}
    with streaming.opened(stores["mixtral"], 0.0, **options) as engine:
        streamer = engine._streamer
        owner, name = {
            "observe": (streamer._policy, "observe"), "pause": (Streamer, "_pause"),
            "record": (streamer.recorder, "demand"),
        }[called_back]  # fmt: skip
        gc.disable()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, divided_by_zero)
                with pytest.raises(ZeroDivisionError) as raised:
                    answer(engine)
            assert "divided_by_zero" in [entry.name for entry in raised.traceback]
            del raised
            assert not list(engine._caches)
        finally:
            gc.enable()
        assert answer(engine) == expected


def divided_by_zero(*_) -> None:
    1 // 0  # noqa: B018


def test_nobody_enters_an_engine_in_the_middle_of_its_step(stores, monkeypatch):
    """A signal's function, or a policy, may try."""
    with edgemem.load(stores["mixtral"]) as engine:
        expected = answer(engine)
    with streaming.opened(stores["mixtral"], 0.0, policy="lru") as engine:
        session = engine.session()
        for entered in (engine.close, engine.clear, lambda: session.feed([1])):
            with monkeypatch.context() as patch:
                patch.setattr(engine._streamer._policy, "observe", lambda *_, f=entered: f())
                with pytest.raises(ValueError, match="in the middle of a step"):
                    answer(engine)
            assert answer(engine) == expected


def test_an_interrupt_while_room_for_logits_is_made(tiny_moe_store, monkeypatch):
    with edgemem.load(tiny_moe_store) as engine:
        expected = answer(engine)
    with edgemem.load(tiny_moe_store) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Vocabulary, "read_out", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.logits([1, 2, 3])
        assert answer(engine) == expected


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("io_engine", ENGINES)
def test_a_forked_child_is_refused_and_lets_go(io_engine, threads, stores):
    """It has memory, but none of the threads that fill it."""
    engine_or_skip(io_engine, stores["qwen3_moe"])
    with streaming.opened(stores["qwen3_moe"], 0.2, io_engine=io_engine, threads=threads) as engine:
        expected = answer(engine)
        time.sleep(0.1)  # until all threads wait for work
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                engine.logits([1, 2, 3])
            except edgemem.UnsupportedError:
                engine.close()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert answer(engine) == expected, "the parent goes on"


def test_trained_experts_stream_with_one_answer(tiny_moe_store):
    with edgemem.load(tiny_moe_store) as engine:
        expected = answer(engine), engine.generate("The river", max_tokens=30)
    for share in (0.0, 0.3):
        with streaming.opened(tiny_moe_store, share) as engine:
            assert (answer(engine), engine.generate("The river", max_tokens=30)) == expected
            statistics = engine.trace.summary()["decode"]
            assert statistics["misses"] > 0 and statistics["read_bytes_per_token"] > 0


def test_sessions_share_the_slots(tiny_moe_store):
    with edgemem.load(tiny_moe_store) as engine:
        expected = [engine.generate(text, max_tokens=12) for text in ("One day", "In the north")]
    with streaming.opened(tiny_moe_store, 0.1) as engine:
        with engine.session() as a, engine.session() as b:
            streams = [
                iter(session.generate(text, max_tokens=12, stream=True))
                for session, text in ((a, "One day"), (b, "In the north"))
            ]
            found = ["", ""]
            for _ in range(40):
                for i, pieces in enumerate(streams):
                    found[i] += next(pieces, "")
        assert found == expected
