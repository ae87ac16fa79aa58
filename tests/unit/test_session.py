"""Sessions and generations on an engine without a model: state, stops, interrupts, limits."""

import gc
import threading
from itertools import pairwise

import numpy as np
import pytest
from fake_engine import FakeEngine, byte_fallback, byte_level
from hypothesis import given
from hypothesis import strategies as st

from edgemem.errors import ContextError
from edgemem.generation import StopFilter
from edgemem.session import Session, check_ids
from edgemem.spec import RopeSpec

BYTES = byte_level()
END = BYTES.special_id("<|end|>")


def scripted(text, end=True, **options):
    """An engine that greedily continues any prompt "…:" with `text`, then its EOS or "."."""
    script = BYTES.encode(text) + ([END] if end else [])
    colon = BYTES.encode(":")[0]

    def follow(ids):
        done = len(ids) - 1 - ids.index(colon) if colon in ids else 0
        return script[done] if done < len(script) else BYTES.encode(".")[0]

    return FakeEngine(BYTES, follow=follow, eos_ids=[END], **options)


def test_generates_until_eos():
    session = Session(scripted("hello"))
    assert session.generate("say:") == "hello"
    assert session.position == 4 + 5 + 1
    assert session.tokens[-1] == END


def test_stream_yields_pieces_and_then_knows_what_happened():
    engine = scripted("né😀")
    generation = Session(engine).generate("say:", stream=True)
    assert engine.steps == [], "work starts with the first piece"
    assert generation.finish_reason is None
    assert list(generation) == ["n", "é", "😀"]
    assert generation.text == "né😀"
    assert generation.finish_reason == "eos"
    assert generation.token_ids == [*BYTES.encode("né😀"), END]
    assert generation.prompt_tokens == generation.prefill.tokens == 4
    assert generation.decode.tokens == len(generation.token_ids) - 1
    assert generation.decode.seconds > 0 and generation.prefill.tokens_per_second > 0


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_max_tokens(count):
    generation = Session(scripted("hello")).generate("say:", max_tokens=count, stream=True)
    assert "".join(generation) == "hello"[:count]
    assert generation.finish_reason == ("eos" if count == 6 else "length")
    assert len(generation.token_ids) == count


def test_no_step_is_run_that_nobody_needs():
    engine = scripted("hello")
    Session(engine).generate("say:", max_tokens=3)
    assert engine.steps == [("prefill", 4), ("decode", 1), ("decode", 1)]


def test_prompts_are_run_in_chunks():
    engine = scripted("hi", context=100, chunk_tokens=8)
    assert Session(engine).generate("x" * 20 + ":") == "hi"
    assert engine.steps[:3] == [("prefill", 8), ("prefill", 8), ("prefill", 5)]


@pytest.mark.parametrize("cut", range(1, 12))
def test_generating_in_parts_gives_what_one_call_gives(cut):
    whole = Session(FakeEngine(BYTES)).generate("seed", max_tokens=12, stream=True)
    list(whole)
    session = Session(FakeEngine(BYTES))
    session.generate("seed", max_tokens=cut)
    session.generate(max_tokens=12 - cut)
    assert session.tokens[4:] == whole.token_ids


def test_feeding_gives_the_logits_and_goes_on():
    engine = FakeEngine(BYTES)
    session = Session(engine)
    ids = BYTES.encode("feed me")
    logits = session.feed(ids[:3])
    assert np.array_equal(logits, engine.logits_after(ids[:3]))
    session.feed(np.array(ids[3:], np.uint8))
    assert session.position == 7 and session.tokens == ids
    assert session.generate(max_tokens=3) == Session(engine).generate(ids, max_tokens=3)


def test_a_text_starts_with_bos_only_at_the_start():
    tokenizer = byte_fallback()
    session = Session(FakeEngine(tokenizer, bos_id=1))
    session.generate("a", max_tokens=0)
    session.generate("a", max_tokens=0)
    assert session.tokens.count(1) == 1 and session.tokens[0] == 1


def test_an_empty_prompt_starts_from_bos_or_is_refused():
    session = Session(FakeEngine(BYTES, bos_id=7))
    session.generate("", max_tokens=0)
    assert session.tokens == [7]
    for prompt in ("", [], None):
        with pytest.raises(ValueError, match="BOS"):
            Session(FakeEngine(BYTES)).generate(prompt)


def test_the_continuation_keeps_its_leading_space():
    """Decoded alone, the first piece would lose it to the decoder's Strip."""
    tokenizer = byte_fallback()
    engine = FakeEngine(tokenizer, follow=lambda ids: tokenizer._inner.token_to_id("▁a"))
    assert Session(engine).generate("a", max_tokens=2) == " a a"


# Stop strings


@pytest.mark.parametrize(
    "stop, expected",
    [
        ("h", ""),
        ("hello", ""),
        ("lo w", "hel"),
        ("world!", "hello "),
        (["world!", "o w"], "hell"),
        (["xyz", "😀"], "hello world"),
        ("absent", "hello world!"),
        ([], "hello world!"),
        ("!!", "hello world!"),
        ("<|end|>", "hello world!"),
    ],
)
def test_stop_strings(stop, expected):
    text = "hello world😀" if "😀" in (stop or "") else "hello world!"
    generation = Session(scripted(text)).generate("say:", stop=stop, stream=True)
    assert "".join(generation) == expected == generation.text
    hit = expected != "hello world!"
    assert generation.finish_reason == ("stop" if hit else "eos")


def test_a_special_token_can_be_a_stop_string():
    engine = scripted("hi")
    engine.eos_ids = frozenset()
    generation = Session(engine).generate("say:", stop="<|end|>", stream=True)
    assert "".join(generation) == "hi" and generation.finish_reason == "stop"


def test_a_stop_string_in_held_back_bytes_counts():
    """Byte tokens are certain only at their end, which here is the end of the generation."""
    tokenizer = byte_fallback()
    script = [tokenizer._inner.token_to_id(f"<0x{b:02X}>") for b in b"x\nUser"]
    engine = FakeEngine(tokenizer, follow=lambda ids: script[len(ids) - 1], bos_id=1)
    generation = Session(engine).generate([1], max_tokens=6, stop="\nU", stream=True)
    assert list(generation) == ["x"] and generation.finish_reason == "stop"


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_filter_does_not_depend_on_how_text_is_cut(text, stops, cuts):
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
    expected = text
    if ends:
        expected = text[: ends[0] - max(len(s) for s in stops if text[: ends[0]].endswith(s))]
    stop_filter, passed = StopFilter(stops), ""
    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for start, end in pairwise(bounds):
        passed += stop_filter.push(text[start:end])
        assert expected.startswith(passed), "a part of a stop string was passed on"
        if stop_filter.hit:
            break
    else:
        passed += stop_filter.flush()
    assert passed == expected and stop_filter.hit == bool(ends)


# The end of the context


def test_a_prompt_that_does_not_fit_is_refused_before_any_work():
    engine = FakeEngine(BYTES, context=16)
    session = Session(engine)
    with pytest.raises(ContextError, match=r"17 tokens .* context of 16 .* .up to 64"):
        session.generate("x" * 17)
    session.feed(BYTES.encode("x" * 10))
    with pytest.raises(ContextError, match="7 tokens .* 10 of them used"):
        session.feed([1] * 7)
    assert session.position == 10


@pytest.mark.parametrize("length", [1, 15, 16])
def test_generation_ends_cleanly_with_the_context(length):
    session = Session(FakeEngine(BYTES, context=16))
    generation = session.generate("x" * length, max_tokens=10**9, stream=True)
    "".join(generation)
    assert generation.finish_reason == "context"
    assert session.position == 16 and len(generation.token_ids) == 16 - length
    again = session.generate(stream=True)
    assert list(again) == [] and again.finish_reason == "context"


LONGROPE = RopeSpec("longrope", original_positions=9)


def test_a_text_that_becomes_long_is_run_again_as_a_prompt():
    """Its first keys have longrope's other factors from there on."""
    engine = FakeEngine(BYTES, chunk_tokens=4, ropes=(LONGROPE,))
    Session(engine).generate("prompt", max_tokens=6)
    again = [("prefill", 4), ("prefill", 4), ("prefill", 1)]
    assert engine.steps == [
        ("prefill", 4), ("prefill", 2), *[("decode", 1)] * 3, *again, *[("decode", 1)] * 2
    ]  # fmt: skip


# Interrupts and threads


@pytest.mark.parametrize(
    ("call", "ropes"), [(i, ropes) for ropes, n in (((), 12), ((LONGROPE,), 22)) for i in range(n)]
)
def test_an_interrupt_at_any_step_leaves_the_session_consistent(call, ropes):
    """Whatever step is cut, before or after its work, going on gives what no interrupt gives."""
    calm = Session(FakeEngine(BYTES, chunk_tokens=4))
    calm.generate("prompt", max_tokens=8)
    engine = FakeEngine(BYTES, chunk_tokens=4, ropes=ropes)
    left = [call]

    def fail():
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt

    engine.fail = fail
    session = Session(engine)
    with pytest.raises(KeyboardInterrupt):
        session.generate("prompt", max_tokens=8)
    assert session.tokens == calm.tokens[: session.position]
    assert session.position == 0 or session.position >= 6, "a prompt is taken whole or not at all"
    if session.position == 0:
        session.generate("prompt", max_tokens=0)
    session.generate(max_tokens=14 - session.position)
    assert session.tokens == calm.tokens


@pytest.mark.parametrize("call", range(6))
def test_a_failed_feed_takes_nothing(call):
    engine = FakeEngine(BYTES, chunk_tokens=2)
    session = Session(engine)
    before = session.feed([1, 2])
    left = [call]

    def fail():
        left[0] -= 1
        if left[0] == -1:
            raise OSError

    engine.fail = fail
    with pytest.raises(OSError):
        session.feed([3, 4, 5, 6, 7])
    assert session.tokens == [1, 2]
    assert np.array_equal(session._sequence.logits(), before)


def test_an_abandoned_stream_leaves_what_was_generated():
    engine = scripted("hello world")
    session = Session(engine)
    stream = session.generate("say:", stream=True)
    assert next(stream) + next(stream) == "he"
    stream.close()
    assert session.generate(max_tokens=3) == "llo"
    with pytest.raises(StopIteration):
        next(stream)


def test_an_older_stream_cannot_resume_after_a_newer_one():
    session = Session(scripted("hello world"))
    old = session.generate("say:", stream=True)
    next(old)
    session.generate(max_tokens=2)
    with pytest.raises(RuntimeError, match="moved on"):
        next(old)


def test_sessions_in_threads_do_not_touch_each_other():
    engine = FakeEngine(BYTES)
    alone = {seed: _sampled(engine, seed) for seed in range(6)}
    together = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: _sampled(engine, s)}))
        for seed in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone.values())) == len(alone)


def _sampled(engine, seed):
    return Session(engine).generate(f"{seed}", max_tokens=20, temperature=1.5, seed=seed)


def test_caches_are_freed():
    engine = scripted("hi")
    session = Session(engine)
    session.generate("say:")
    assert engine.caches == 1
    session.close()
    session.close()
    gc.collect()
    assert engine.caches == 0
    with pytest.raises(ValueError, match="closed"):
        session.generate("more")
    stream = Session(engine).generate("say:", stream=True)
    assert "".join(stream) == "hi"
    gc.collect()
    assert engine.caches == 0, "a finished stream needs no cache"


# Arguments


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"max_tokens": -1}, ValueError, "max_tokens"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens"),
        ({"max_tokens": True}, TypeError, "max_tokens"),
        ({"stop": ""}, ValueError, "stop"),
        ({"stop": [1]}, TypeError, "stop"),
        ({"stop": 7}, TypeError, "stop"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temprature": 1}, TypeError, "temprature"),
        ({"prompt": 7}, TypeError, "flat sequence|integers"),
        ({"prompt": b"x"}, TypeError, "encode"),
    ],
)
def test_arguments_are_checked_before_any_work(arguments, error, words):
    engine = FakeEngine(BYTES)
    with pytest.raises(error, match=words):
        Session(engine).generate(**({"prompt": "x", "stream": True} | arguments))
    assert engine.steps == []


@pytest.mark.parametrize("ids", [[-1], [0, 300], [2**40], [2**70], np.array([300], np.uint64)])
def test_ids_out_of_range_are_named(ids):
    with pytest.raises(ValueError, match="out of range.*0 to 256"):
        check_ids(ids, 257)


@pytest.mark.parametrize("ids", [[1.0], ["1"], "12", [True], [None], [[1]] * 2, 5])
def test_ids_of_a_wrong_type(ids):
    with pytest.raises((TypeError, ValueError)):
        check_ids(ids, 257)


def test_ids_in_many_shapes():
    for ids in ([], (1, 2), range(3), np.arange(4, dtype=np.int64)):
        checked = check_ids(ids, 257)
        assert checked.dtype == np.int32 and checked.tolist() == list(ids)


def test_feeding_nothing_is_refused():
    with pytest.raises(ValueError, match="no ids"):
        Session(FakeEngine(BYTES)).feed([])


@pytest.mark.parametrize("id", [10**30, -(10**30), 2**63])
def test_huge_ids_are_named(id):
    with pytest.raises(ValueError, match=f"token id {id} at place 1 is out of range"):
        check_ids([-0, id], 257)


def test_ragged_ids_are_of_a_wrong_type():
    with pytest.raises(TypeError, match="flat sequence"):
        check_ids([[1], [1, 2]], 257)


def test_a_stream_of_a_closed_session_says_so():
    engine = scripted("hello")
    session = Session(engine)
    stream = session.generate("say:", stream=True)
    next(stream)
    session.close()
    assert engine.caches == 0
    with pytest.raises(ValueError, match="the session was closed"):
        next(stream)


def test_a_text_that_cannot_fit_is_refused_without_being_encoded(monkeypatch):
    engine = FakeEngine(BYTES, context=16)
    least = -(-40_000_000 // BYTES.longest_token)
    monkeypatch.setattr(engine.tokenizer, "_inner", None)
    with pytest.raises(ContextError, match=f"at least {least} tokens .* context of 16"):
        Session(engine).generate("x" * 40_000_000)
