"""Runs in which neurons stream replay to the same hits, turn by turn, without the model."""

import numpy as np
import pytest
import streaming
import tiny
from streaming import answer

import edgemem
from edgemem import benchmark, converters, planner, tracefile
from edgemem.calibration import calibrate
from edgemem.recorder import Recorder

pytest.importorskip("numba", reason="the replay needs numba: pip install edgemem[bench]")

from bench import replay, replay_rows  # noqa: E402

KINDS = ("llama", "opt", "falcon")
WIDTHS = (150, 1100, 2500, 5000)
"""Of FFNs: active neurons are wanted in one part, two, three and four."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory, seed_base) -> dict[tuple[str, int], str]:
    """Random models whose FFNs come apart."""
    folder, made = tmp_path_factory.mktemp("traces"), {}
    for i, width in enumerate(WIDTHS):
        kind, name = KINDS[i % 3], folder / f"{i}"
        tiny.write(name, kind, seed_base + 8100 + i, activation="relu", intermediate=width)
        made[kind, width] = f"{name}.edgemem"
        converters.convert(name, made[kind, width], neurons=True)
    return made


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory) -> str:
    """The trained model, whose neurons rest as those of real ones do."""
    path = tmp_path_factory.mktemp("trained") / "relu.edgemem"
    converters.convert(shared / "models" / "tiny-relu", path, dtype="q8_0", neurons=True)
    return str(path)


@pytest.fixture(scope="module")
def foretold(trained, tmp_path_factory) -> str:
    """The same with predictors."""
    path = tmp_path_factory.mktemp("foretold") / "relu.edgemem"
    calibrate(trained, np.arange(5, 505), path, recall=0.9, limit=400)
    return str(path)


def assert_replays(path) -> replay_rows.Rows:
    rows = replay_rows.read(path)
    found = replay_rows.hits_of(rows, rows.room, rows.resized)
    assert np.array_equal(found, rows.hits), np.flatnonzero(found != rows.hits)
    return rows


@pytest.mark.parametrize("case", range(len(WIDTHS)))
def test_random_models_replay(case, stores, tmp_path):
    kind, width = list(stores)[case]
    events = hits = 0
    for share in (0.0, 0.1, 0.4, 0.9):
        for chunk in (1, 6, None):
            path = tmp_path / f"{share}-{chunk}.jsonl"
            with streaming.opened(stores[kind, width], share, chunk, trace=path) as engine:
                assert len(engine._plan.apart) > 0
                for seed in range(2):
                    answer(engine, seed)
                taken = engine._streamer.rows.statistics()
            rows = assert_replays(path)
            assert rows.hits.sum() == taken["hits"]
            assert len(rows.ids) == taken["hits"] + taken["misses"]
            events += len(rows.sets)
            hits += rows.hits.sum()
    assert events > 100 and hits > 0


@pytest.mark.parametrize("share", (0.0, 0.3, 0.9))
def test_what_was_foretold_replays(share, foretold, tmp_path):
    with streaming.opened(foretold, share, trace=tmp_path / "x", predict=True) as engine:
        answer(engine)
        taken = engine._streamer.rows.statistics()
    rows = assert_replays(tmp_path / "x")
    assert rows.hits.sum() == taken["hits"] and len(rows.ids) > 1000


@pytest.mark.parametrize("least", (1, 2, 3, 7))
def test_little_room_replays(least, stores, tmp_path, monkeypatch):
    """Then most of it is kept for what is there, and the rest comes in rounds of a row or two."""
    monkeypatch.setattr(planner, "MIN_ROWS", least)
    for path in list(stores.values())[:2]:
        with streaming.opened(path, 0.0, trace=tmp_path / "x") as engine:
            assert engine._streamer.rows.rooms[0] == least
            answer(engine)
        rows = assert_replays(tmp_path / "x")
        assert len(rows.ids) > 10 * len(rows.sets), "turns want more than that"


@pytest.mark.parametrize("share", (0.01, 0.1, 0.3, 0.7))
def test_a_trained_model_replays(share, trained, tmp_path):
    with streaming.opened(trained, share, trace=tmp_path / "x") as engine:
        engine.generate("Once upon a time", max_tokens=30)
        with engine.session() as session:
            for i in range(5, 45):
                session.feed([i])
        room = engine._streamer.rows.rooms
    rows = assert_replays(tmp_path / "x")
    assert tuple(rows.room) == room and rows.counts.tolist() == [1536] * 6
    wanted = np.diff(rows.starts)
    assert (wanted > rows.room[0]).any() or share > 0.5, "some turns come in rounds"
    assert 0 < rows.hits.sum() < len(rows.ids)
    assert rows.hit_rate(replay_rows.best(rows, rows.rooms())) >= rows.hit_rate(rows.hits)


def test_room_that_changes_is_followed(trained, stores, tmp_path, seed_base):
    """Between steps, also several times, and from crowded turns to those that have room."""
    for path in (trained, *stores.values()):
        random = np.random.default_rng(seed_base)
        with streaming.opened(path, 0.9, 4, trace=tmp_path / "x") as engine:
            most, least = engine._slab_room(), engine._plan.least_bytes
            engine._slab_room = lambda: int(random.integers(least, most + 1))
            vocab = engine.spec.vocab_size
            with engine.session() as session:
                for _ in range(min(25, engine.context // 4)):
                    session.feed(random.integers(0, vocab, random.integers(1, 5)))
                    if random.random() < 0.3:
                        engine._fit_slab()
            room = engine._streamer.rows.rooms
        rows = assert_replays(tmp_path / "x")
        changes = list(rows.resized.values())
        assert len(changes) > 5 and max(map(len, changes)) > 1
        assert tuple(changes[-1][-1]) == room


def test_steps_say_what_they_took_and_read(trained, tmp_path):
    path = tmp_path / "x"
    with streaming.opened(trained, 0.2, 8, trace=path, lookahead=False) as engine:
        with engine.session() as session:
            session.feed(list(range(5, 25)))
            session.feed([7])
        taken, summary = engine._streamer.rows.statistics(), engine.trace.summary()["prefill"]
    header, lines = tracefile.read(path)
    lines = list(lines)
    assert header.row_layers == tuple(range(1, 7)) and len(lines) == 4

    def total(name: str, of: str = "rows") -> int:
        return sum(sum((line if of == "bundles" else line["rows"])[name]) for line in lines)

    assert all(line["rows"]["sets"] == list(range(6)) for line in lines)
    assert total("hits") == taken["hits"] and total("bytes") == taken["read_bytes"]
    assert total("stall_us") == taken["stall_us"] > 0
    assert total("hits") + total("hits", "bundles") == summary["hits"]
    stalled = (total("stall_us") + total("stall_us", "bundles")) / 1e6
    assert stalled == pytest.approx(summary["stall_seconds"], abs=1e-4)


def test_a_benchmark_writes_down_the_same_demand(trained, tmp_path):
    with streaming.opened(trained, 0.3, trace=tmp_path / "x") as engine:
        logs, write_down = [], engine._streamer.rows.write_down

        def kept(*room):
            logs.append(write_down(*room))
            return logs[-1]

        engine._streamer.rows.write_down = kept
        benchmark.measure(engine, 12, 6, 2)
    rows = assert_replays(tmp_path / "x")  # of the first repetition alone
    assert len(rows.sets) == logs[0].n_turns
    numbers = np.repeat(rows.bases[rows.sets], np.diff(rows.starts)) + rows.ids
    assert np.array_equal(numbers, logs[0].indices)


def test_recording_changes_no_answer(trained, tmp_path):
    found = []
    for options in ({}, {"trace": tmp_path / "x"}):
        with streaming.opened(trained, 0.2, **options) as engine:
            found.append(answer(engine))
    assert found[0] == found[1]


def test_an_interrupted_step_leaves_no_line(trained, tmp_path, monkeypatch):
    with streaming.opened(trained, 0.3, trace=tmp_path / "x") as engine:
        recorder, calls = engine._streamer.recorder, []

        def interrupted(*turn):
            calls.append(0)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return Recorder.rows(recorder, *turn)

        with engine.session() as session:
            session.feed([1, 2, 3])
            monkeypatch.setattr(recorder, "rows", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.feed([4, 5])
            session.feed([6])
    lines = list(tracefile.read(tmp_path / "x")[1])
    assert [(line["tokens"], len(line["rows"]["sets"])) for line in lines] == [(3, 6), (1, 6)]


def test_a_trace_with_rows_is_a_profile(trained, tmp_path):
    with streaming.opened(trained, 0.3, trace=tmp_path / "x") as engine:
        expected = answer(engine)
    options = {"policy": "static", "profile": tmp_path / "x"}
    with streaming.opened(trained, 0.3, **options) as engine:
        assert answer(engine) == expected
        assert engine._streamer._policy.ranks(1).sum() > 0


def test_rows_have_a_table_of_their_own(trained, tmp_path, monkeypatch, capsys):
    with streaming.opened(trained, 0.3, trace=tmp_path / "run.trace") as engine:
        answer(engine)
    monkeypatch.setattr("sys.argv", ["replay", str(tmp_path / "run.trace"), "--share", "0.2"])
    replay.main()
    bundles, rows, again = capsys.readouterr().out.split("\n\n")
    assert bundles.count("| run |") == rows.count("| run |") == 1
    heat, lru, best = map(float, rows.splitlines()[-1].split("|")[3:6])
    assert lru < heat < best
    turns = len(replay_rows.read(tmp_path / "run.trace").sets)
    assert f"hits are equal in {turns} of {turns} turns" in again


def test_resident_neurons_leave_nothing_in_a_trace(trained, tmp_path):
    with edgemem.load(trained, trace=tmp_path / "x") as engine:
        answer(engine)
    assert replay_rows.read(tmp_path / "x") is None
