"""Engines on real stores: loading, refusals, logits, sessions and their memory."""

import gc
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

import edgemem
from edgemem import BudgetError, ContextError, StoreError, UnsupportedError
from edgemem.budget import Item, show_size
from edgemem.engine import context_limit
from edgemem.inventory import resident_bytes
from edgemem.kvcache import cache_bytes
from edgemem.spec import RopeSpec

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engine(stories_store):
    with edgemem.load(stories_store, threads=2) as engine:
        yield engine


def test_what_an_engine_shows(engine):
    assert engine.spec.model_type == "llama"
    assert engine.context == engine.spec.max_positions == 512
    assert engine.threads == 2 and engine.isa
    assert engine.bos_id == 1 and engine.eos_ids == {2}


def test_text_streamed_and_whole_are_the_same(engine):
    whole = engine.generate(PROMPT, max_tokens=40)
    stream = engine.generate(PROMPT, max_tokens=40, stream=True)
    assert "".join(stream) == whole == stream.text
    assert len(whole) > 40 and stream.finish_reason == "length"
    with engine.session() as session:
        parts = session.generate(PROMPT, max_tokens=15) + session.generate(max_tokens=25)
    assert parts == whole


def test_seeds_repeat(engine):
    def sample(seed):
        return engine.generate(PROMPT, max_tokens=30, temperature=1.0, top_p=0.95, seed=seed)

    assert sample(1) == sample(1) != sample(2)


def test_logits_of_every_position(engine):
    ids = engine.tokenizer.encode(PROMPT) * 40  # several chunks
    logits = engine.logits(ids)
    assert logits.shape == (len(ids), engine.spec.vocab_size) and logits.dtype == np.float32
    with engine.session() as session:
        assert np.array_equal(session.feed(ids), logits[-1])
    with engine.session() as session:
        for i in (0, 1):
            assert np.array_equal(session.feed(ids[i : i + 1]), logits[i])
    assert engine.logits([]).shape == (0, engine.spec.vocab_size)


def test_bad_ids_and_long_prompts_are_refused(engine):
    for ids in ([512], [-1], [0, 10**9]):
        with pytest.raises(ValueError, match="out of range"):
            engine.logits(ids)
    for call in (engine.logits, engine.generate):
        with pytest.raises(ContextError, match="513 tokens .* context of 512"):
            call([1] * 513)


def test_the_context_can_be_filled_to_the_last_token(engine):
    stream = engine.generate([1] * 510, max_tokens=1000, stream=True)
    "".join(stream)
    assert len(stream.token_ids) <= 2 and stream.finish_reason in ("context", "eos")
    assert len(engine.logits([1] * 512)) == 512


def test_sessions_in_threads_say_what_they_say_alone(engine):
    def say(seed):
        return engine.generate(f"{PROMPT} {seed}", max_tokens=25, temperature=1.0, seed=seed)

    alone = {seed: say(seed) for seed in range(4)}
    together = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: say(s)})) for seed in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_the_trace_counts_tokens(engine):
    engine.trace.clear()
    engine.generate(PROMPT, max_tokens=9)
    summary = engine.trace.summary()
    assert summary["prefill"]["tokens"] == 5 and summary["decode"]["tokens"] == 8
    assert summary["decode"]["tokens_per_second"] > 0


def test_threads_and_isa_do_not_change_the_text(stories_store, engine):
    whole = engine.generate(PROMPT, max_tokens=60)
    with edgemem.load(stories_store, threads=1) as other:
        assert other.generate(PROMPT, max_tokens=60) == whole


def test_a_closed_engine_says_so(stories_store):
    engine = edgemem.load(stories_store)
    session = engine.session()
    session.generate(PROMPT, max_tokens=2)
    engine.close()
    engine.close()
    for call in (engine.session, lambda: engine.generate("x"), lambda: session.generate("more")):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_progress_ends_at_the_total(stories_store):
    calls = []
    edgemem.load(stories_store, progress=lambda done, total: calls.append((done, total))).close()
    assert calls and calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


# Context


def test_context_is_what_was_asked_within_what_the_model_takes(stories_store):
    with edgemem.load(stories_store, context=16) as engine:
        assert engine.context == 16
        with pytest.raises(ContextError, match=r"17 .* context of 16 .*up to 512"):
            engine.generate([1] * 17)
    with pytest.raises(ValueError, match="context 513 .* 512"):
        edgemem.load(stories_store, context=513)


def test_scaled_rope_stretches_the_limit(engine):
    spec = engine.spec
    yarn = RopeSpec(type="yarn", factor=4.0, original_positions=512)
    assert context_limit(replace(spec, rope=yarn)) == 2048
    shorter = RopeSpec(type="llama3", factor=8.0, original_positions=16)
    assert context_limit(replace(spec, rope=shorter)) == spec.max_positions


# Arguments and memory


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"context": 0}, ValueError),
        ({"context": 1.5}, TypeError),
        ({"threads": 0}, ValueError),
        ({"threads": "all"}, TypeError),
        ({"threads": True}, TypeError),
        ({"threads": 1025}, ValueError),
        ({"memory": "much"}, ValueError),
        ({"memory": 0}, ValueError),
        ({"memory": None}, TypeError),
    ],
)
def test_arguments_are_checked(stories_store, arguments, error):
    with pytest.raises(error, match=f"{next(iter(arguments))}"):
        edgemem.load(stories_store, **arguments)


def test_what_is_no_store_is_named(tmp_path):
    (tmp_path / "text").write_text("no store")
    for name in ("absent", "text", "."):
        with pytest.raises(StoreError, match="opening"):
            edgemem.load(tmp_path / name)


def test_a_budget_below_the_floor_is_refused_before_weights_are_read(tiny_moe_store):
    def read(done, total):
        raise AssertionError("weights were read")

    with pytest.raises(BudgetError) as refusal:
        edgemem.load(tiny_moe_store, memory="64M", progress=read)
    text = str(refusal.value)
    for line in ("process before", "weights", "scratch", "KV cache", "sum", "budget (as asked)"):
        assert f"\n  {line}" in text
    assert "--memory" in text


def test_a_refusal_says_what_would_fit(tiny_moe_store, shared, convert_store):
    engine = edgemem.load(tiny_moe_store)
    cache = Item("KV cache", cache_bytes(engine.spec, engine.context))
    items = [Item("all but the cache", resident_bytes(engine.store) + (30 << 20)), cache]
    needed = sum(item.bytes for item in items)
    engine.budget.limit = engine.budget.promised + needed - cache.bytes // 2
    with pytest.raises(BudgetError) as refusal:
        engine.budget.take(items, engine._advise)
    advice = str(refusal.value)
    assert "(--context 512)" in advice
    smaller = convert_store(shared / "models" / "tiny-moe", dtype="q8_0")
    with edgemem.load(smaller) as other:
        size = show_size(resident_bytes(other.store))
    assert f"at q8_0 would fit: about {size[:3]}" in advice and "--dtype q8_0" in advice
    total = engine.budget.promised + needed
    assert f"--memory {-(-total // (1 << 20)) + 1}M" in advice


PEAK = """
import sys, edgemem
from edgemem.budget import peak_bytes
from edgemem.perplexity import perplexity
engine = edgemem.load(sys.argv[1])
engine.generate([5] * (engine.context - 20), max_tokens=100, temperature=1.0)
print(engine.budget.promised - peak_bytes())
perplexity(engine, [5] * 300)
print(engine.budget.promised - peak_bytes())
"""


def test_logits_are_in_the_budget_while_they_are_made(tiny_moe_store):
    with edgemem.load(tiny_moe_store) as engine:
        engine.logits([5])
        promised = engine.budget.promised
        engine.budget.limit = promised + 4 * 10 * engine.spec.vocab_size
        engine.logits([5] * 10)
        with pytest.raises(BudgetError, match="logits of 11 tokens"):
            engine.logits([5] * 11)
        assert engine.budget.promised == promised


def test_a_cache_that_the_system_refuses_is_not_promised(stories_store, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError("reserving")

    with edgemem.load(stories_store) as engine:
        promised = engine.budget.promised
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr("edgemem.engine.KvCache", refuse)
            engine.session()
        session = engine.session()
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr("edgemem.engine.KvCache", refuse)
            engine.session()
        assert engine.budget.promised == promised and session.position == 0


def test_a_prompt_is_checked_before_weights_are_read(stories_store):
    def read(done, total):
        raise AssertionError("weights were read")

    def ready(engine):
        with pytest.raises(ValueError, match="stop string"):
            engine.check("x", stop="")
        with pytest.raises(TypeError, match="temprature"):
            engine.check("x", temprature=1)
        engine.check("x" * 40_000_000)

    with pytest.raises(ContextError, match="at least"):
        edgemem.load(stories_store, progress=read, ready=ready)


def test_an_instruction_set_that_is_none_is_refused_with_those_that_run(stories_store, monkeypatch):
    monkeypatch.setenv("EDGEMEM_ISA", "abacus")
    with pytest.raises(UnsupportedError, match="abacus.*scalar"):
        edgemem.load(stories_store)


@pytest.mark.parametrize("name", ["stories_store", "tiny_moe_store"])
def test_the_peak_of_the_process_stays_within_the_promise(name, request):
    command = [sys.executable, "-c", PEAK, request.getfixturevalue(name)]
    spare = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert all(0 <= int(size) < 8 << 20 for size in spare)


def test_one_session_is_in_the_budget_and_more_are_added(tiny_moe_store):
    engine = edgemem.load(tiny_moe_store)
    cache = cache_bytes(engine.spec, engine.context) + 4 * engine.spec.vocab_size  # and logits
    floor = engine.budget.promised
    first = engine.session()
    assert engine.budget.promised == floor
    second = engine.session()
    assert engine.budget.promised == floor + cache
    engine.budget.limit = floor + cache
    with pytest.raises(BudgetError, match="KV cache"):
        engine.session()
    first.close()
    third = engine.session()
    assert third.generate("The", max_tokens=2) == second.generate("The", max_tokens=2)
    for session in (second, third):
        session.close()
    gc.collect()
    assert engine.budget.promised == floor
    for _ in range(5):
        engine.generate("The", max_tokens=1)
    assert engine.budget.promised == floor


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_interrupts_at_any_moment_change_no_text(stories_store, rng):
    """Wherever a signal falls, in native code or between, the session goes on as if it had not."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # an interrupt that falls into a callback of the collector would be lost
    try:
        with edgemem.load(stories_store, threads=1) as engine:
            prompt = engine.tokenizer.encode(PROMPT) * 10
            with engine.session() as session:
                session.generate(prompt, max_tokens=100)
                expected = session.tokens
            for delay in rng.uniform(0.0005, 0.01, 40):
                assert _interrupted(engine, prompt, expected, delay) == expected
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, before)


def _interrupted(engine, prompt, expected, delay):
    """The tokens of a session that is interrupted after `delay` seconds, and then goes on."""
    with engine.session() as session:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            session.generate(prompt, max_tokens=100)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
        assert session.position == 0 or session.position >= len(prompt)
        rest = len(expected) - max(session.position, len(prompt))
        session.generate(None if session.position else prompt, max_tokens=rest)
        return session.tokens
