"""A live run that was recorded replays to the same hits, layer by layer, without the model."""

import json

import numpy as np
import pytest
import streaming
import tiny
from tiny_config import ROUTED_TYPES

import edgemem
from edgemem import policies, tracefile
from edgemem._native import lib
from edgemem.recorder import Recorder

pytest.importorskip("numba", reason="the replay needs numba: pip install edgemem[bench]")

from bench import replay, replay_traces  # noqa: E402

LIVE = {"lookahead": False}
"""Exact are hits of what was not read ahead."""

POLICIES = [name for name in policies.POLICIES if name != "static"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, convert_store, seed_base, tiny_moe_store) -> dict[str, str]:
    """Random models of the routed types, some with dense layers between; and a trained one."""
    folder, made = tmp_path_factory.mktemp("traces"), {"trained": tiny_moe_store}
    for kind in ROUTED_TYPES:
        for seed in range(2):
            name = f"{kind}-{seed}"
            tiny.write(folder / name, kind, seed_base + 3000 + seed)
            made[name] = convert_store(folder / name)
    return made


def run(engine, prompts=(23, 9), tokens=12) -> None:
    """Some sessions: prefill, then one token at a time."""
    random = np.random.default_rng(5)
    for prompt in prompts:
        prompt = min(prompt, engine.context // 2)
        ids = random.integers(0, engine.spec.vocab_size, min(engine.context, prompt + tokens))
        with engine.session() as session:
            session.feed(ids[:prompt])
            for i in range(prompt, len(ids)):
                session.feed(ids[i : i + 1])


def assert_replays(path) -> replay_traces.Routing:
    """In every routed layer of every step."""
    routing = replay_traces.read(path)
    found, ahead = replay.again(routing), routing.read_ahead
    assert np.array_equal(found[~ahead], routing.hits[~ahead])
    return routing


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [f"{kind}-{seed}" for kind in ROUTED_TYPES for seed in (0, 1)])
def test_random_models_replay(kind, policy, stores, tmp_path):
    events = 0
    for share in (0.0, 0.3, 0.8):
        for chunk in (1, 5, None):
            path = tmp_path / f"{share}-{chunk}.jsonl"
            with streaming.opened(
                stores[kind], share, chunk, policy=policy, trace=path, **LIVE
            ) as engine:
                run(engine)
            events += (~assert_replays(path).read_ahead).sum()
    assert events > 50


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trained_model_replays(policy, stores, tmp_path):
    hits = 0
    for share, chunk in ((0.02, None), (0.1, 7), (0.5, 16)):
        path = tmp_path / "run.jsonl"
        with streaming.opened(
            stores["trained"], share, chunk, policy=policy, trace=path, **LIVE
        ) as engine:
            engine.generate("The river", max_tokens=25)
            run(engine, (60,))
            slots = engine._streamer.slots
        routing = assert_replays(path)
        assert routing.slots == slots and routing.policy == policy and not routing.resized
        hits += routing.hits.sum()
    assert hits > 100


def test_steps_say_what_they_did(stores, tmp_path):
    path = tmp_path / "run.jsonl"
    with streaming.opened(stores["trained"], 0.1, 8, trace=path, **LIVE) as engine:
        run(engine, (20,), 3)
        summary = engine.trace.summary()["prefill"]
        size = int(engine._streamer._residency.sizes[engine._plan.streamed[0]])
    header, lines = tracefile.read(path)
    lines = list(lines)
    assert (header.model, header.n_layers) == ("qwen3_moe", 8)
    assert [line["tokens"] for line in lines] == [8, 8, 4, 1, 1, 1]
    for line in lines:
        assert line["layers"] == list(range(1, 7))
        assert ("uses" in line) == (line["tokens"] > 1)
        for ids, uses in zip(line["ids"], line.get("uses", [])):
            assert len(ids) == len(uses) and sum(uses) == 4 * line["tokens"]
    demanded = sum(len(ids) for line in lines for ids in line["ids"])
    assert sum(sum(line["hits"]) for line in lines) == summary["hits"]
    assert demanded == summary["hits"] + summary["misses"]
    assert sum(sum(line["bytes"]) for line in lines) == summary["misses"] * size
    stalled = sum(sum(line["stall_us"]) for line in lines) / 1e6
    assert stalled == pytest.approx(summary["stall_seconds"])


def test_a_run_in_which_nothing_streams_has_no_layers(stores, tmp_path):
    path = tmp_path / "run.jsonl"
    with edgemem.load(stores["trained"], trace=path) as engine:
        run(engine, (20,), 3)
    header, lines = tracefile.read(path)
    assert header.layer_of == () and [line["tokens"] for line in lines] == [20, 1, 1, 1]
    with pytest.raises(edgemem.StoreError, match="nothing streamed"):
        replay_traces.read(path)


def test_interrupted_and_failed_steps_leave_no_line(stores, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    with streaming.opened(stores["trained"], 0.1, trace=path) as engine, engine.session() as s:
        s.feed([1, 2, 3])
        recorder, calls = engine._streamer.recorder, []

        def interrupted(*demand):
            calls.append(0)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return Recorder.demand(recorder, *demand)

        monkeypatch.setattr(recorder, "demand", interrupted)
        with pytest.raises(KeyboardInterrupt):
            s.feed([4, 5])
        s.feed([6])
    _, lines = tracefile.read(path)
    assert [(line["tokens"], len(line["layers"])) for line in lines] == [(3, 6), (1, 6)]


def test_a_step_whose_read_failed_leaves_no_line(stores, tmp_path):
    failed = 0
    for first in range(0, 60, 3):
        path = tmp_path / f"{first}.jsonl"
        faults = {"kind": lib.EM_FAULT_ERROR, "first": first, "count": 1, "seed": first}
        try:
            with streaming.opened(stores["mixtral-0"], 0.0, faults=faults, trace=path) as engine:
                with engine.session() as session:
                    for i in range(20):
                        try:
                            session.feed([i])
                        except edgemem.FlashError:
                            failed += 1
                steps = engine.trace.summary()["prefill"]["steps"]
        except edgemem.FlashError:  # of a resident bundle, while loading
            continue
        lines = list(tracefile.read(path)[1])
        assert len(lines) == steps and path.read_bytes().endswith(b"\n")
        assert all(line["layers"] == lines[0]["layers"] for line in lines)
        assert len(lines[0]["layers"]) >= engine.spec.n_layers
    assert failed > 0


def test_recording_changes_no_answer(stores, tmp_path):
    found = []
    for options in ({}, {"trace": tmp_path / "run.jsonl"}):
        with streaming.opened(stores["trained"], 0.1, **options) as engine:
            found.append(engine.generate("The river", max_tokens=20))
    assert found[0] == found[1]


def test_clearing_starts_anew(stores, tmp_path):
    path = tmp_path / "run.jsonl"
    with streaming.opened(stores["trained"], 0.3, trace=path, **LIVE) as engine:
        misses = []
        for _ in range(2):
            engine.trace.clear()
            run(engine)
            misses.append(engine.trace.summary()["prefill"]["misses"])
            engine.clear()
    assert misses[0] == misses[1]
    routing = assert_replays(path)  # of the first run alone
    assert np.diff(routing.starts).sum() - routing.hits.sum() == misses[0]


def test_a_trace_that_cannot_be_written_is_an_error(stores, tmp_path):
    with pytest.raises(edgemem.EdgeMemError, match="recording a trace in .*nowhere"):
        edgemem.load(stores["trained"], trace=tmp_path / "nowhere" / "x")


def test_slots_that_change_are_followed(stores, tmp_path):
    """Between steps, also several times; what leaves and what stays is the same in replay."""
    for policy in POLICIES:
        path, random = tmp_path / f"{policy}.jsonl", np.random.default_rng(7)
        options = {"policy": policy, "trace": path, "lookahead": False}
        with streaming.opened(stores["trained"], 0.6, 16, **options) as engine:
            whole = engine._slab_room()
            engine._slab_room = lambda: int(whole * random.uniform(0.2, 1))
            with engine.session() as session:
                for _ in range(30):
                    session.feed(random.integers(0, engine.spec.vocab_size, random.integers(1, 9)))
                    if random.random() < 0.3:
                        engine._fit_slab()
        routing = assert_replays(path)
        changes = list(routing.resized.values())
        assert len(changes) > 20 and max(map(len, changes)) > 1
        assert routing.hits.sum() > 100


def test_with_lookahead_a_trace_says_that_hits_are_by_chance(stores, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    with streaming.opened(stores["trained"], 0.3, trace=path) as engine:
        run(engine)
    routing = replay_traces.read(path)
    assert routing.read_ahead.all()
    replay.show_again(routing)
    assert "layers read ahead of steps" in capsys.readouterr().out


def test_a_trace_is_a_profile_for_the_static_policy(tiny_moe_store, tmp_path):
    path = tmp_path / "profile.trace"
    with edgemem.load(tiny_moe_store) as engine:
        expected = engine.generate("The river", max_tokens=20)
    with streaming.opened(tiny_moe_store, 0.3, trace=path) as engine:
        assert engine.generate("The river", max_tokens=20) == expected
    with streaming.opened(tiny_moe_store, 0.3, policy="static", profile=path) as engine:
        assert engine.generate("The river", max_tokens=20) == expected
        known = engine._streamer._policy.ranks(1)
        profile = path.read_bytes()
        path.unlink()
        engine.clear()
        assert np.array_equal(known, engine._streamer._policy.ranks(1)), "it is read once"
    path.write_bytes(profile)
    routing = replay_traces.read(path)
    taken = np.zeros(len(known), np.int64)
    np.add.at(taken, routing.ids, routing.uses)
    assert np.array_equal(known, taken) and taken.sum() > 0


def test_a_profile_of_something_else_is_refused_before_weights_are_read(
    tiny_moe_store, stores, tmp_path
):
    read = []
    with streaming.opened(tiny_moe_store, 0.3, trace=tmp_path / "trace") as engine:
        run(engine)
    (tmp_path / "text").write_text("Once upon a time\n")
    for name, store in (("trace", stores["mixtral-0"]), ("text", tiny_moe_store),
                        ("absent", tiny_moe_store)):  # fmt: skip
        options = {"policy": "static", "profile": tmp_path / name}
        with (
            pytest.raises(edgemem.StoreError, match=name),
            streaming.opened(store, 0.3, progress=lambda *_: read.append(1), **options),
        ):
            pass
    lines = (tmp_path / "trace").read_text().splitlines()
    for step in ("[" * 100_000, "3", '{"ids":[[-1]]}', '{"ids":[[1e400]]}',
                 '{"ids":[[0]],"uses":[[1%s]]}' % ("0" * 400)):  # fmt: skip
        (tmp_path / "wrong").write_text(f"{lines[0]}\n{step}\n")
        with pytest.raises(edgemem.StoreError, match="wrong"):
            tracefile.popularity(tmp_path / "wrong", json.loads(lines[0])["layer_of"])
    assert not read
    for options in ({"policy": "static"}, {"profile": tmp_path / "trace"}):
        with pytest.raises(ValueError, match="need each other"):
            edgemem.load(tiny_moe_store, **options)
