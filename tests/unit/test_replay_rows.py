"""Rows in trace files, and their replay: caches against plain models, and hostile files."""

import base64
import json
import zlib
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemem import tracefile
from edgemem.errors import StoreError
from edgemem.tracefile import TraceHeader, TraceWriter, pack, unpack

pytest.importorskip("numba", reason="the replay needs numba: pip install edgemem[bench]")

from bench import replay, replay_rows, replay_traces  # noqa: E402

HEADER = TraceHeader(
    "opt", "lru", 3, (0, 1), (0, 0), (1,), row_layers=(1, 2), row_counts=(9, 300), room=(4, 200)
)
TURNS = [[[0, 1, 2], [0, 255, 299]], [[2, 8], []], [[0, 1, 2, 3, 4, 5], [299]]]


def write_trace(path) -> None:
    writer = TraceWriter(path, HEADER)
    for step, turns in enumerate(TURNS):
        if step == 1:
            writer.resize((1,), (3, 100))
            writer.resize((2,), (5, 7))
        writer.demand(0, [0], hits=0)
        for number, ids in enumerate(turns):
            writer.rows(number, np.array(ids, np.uint32), hits=len(ids) // 2, bytes=4096)
        writer.step("decode", 1)
    writer.close()


def rows_of(demand: list[list[int]], n_rows: int = 8, room: int = 3) -> replay_rows.Rows:
    """Turns of one set, each of one step."""
    n, ids = len(demand), np.array(sum(demand, []), np.int32)
    return replay_rows.Rows(
        "test", np.array([n_rows]), np.zeros(n, np.int64), np.arange(n),
        np.cumsum([0, *map(len, demand)]), ids, np.zeros(n, np.int64), np.array([room]),
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 5000), max_size=60).map(sorted))
def test_ids_are_packed_and_unpacked(ids):
    assert unpack(pack(np.array(ids, np.uint32)), 5001).tolist() == ids


def test_packed_ids_take_little():
    random = np.random.default_rng(3)
    few = np.flatnonzero(random.random(16384) < 0.05)
    assert len(pack(few)) < 1.2 * len(few)
    many = np.flatnonzero(random.random(16384) < 0.6)
    assert len(pack(many)) < 0.5 * len(many)


def packed(*values: int) -> str:
    return base64.b64encode(zlib.compress(bytes(values))).decode()


WRONG = {
    "an end that is missing": packed(3, 255),
    "an id too many": packed(*[0] * 301),
    "an id beyond": packed(255, 45),
    "ids without end": packed(*[0] * 10_000_000),
    "bytes that are not zlib's": "AAAA",
    "a piece": base64.b64encode(zlib.compress(bytes(300))[:-5]).decode(),
    "no base64": "!",
    "no ASCII": "Ä",
    "a number": 3,
    "nothing": None,
    "a list": ["AAAA"],
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_was_not_packed_is_refused(text):
    assert unpack(packed(255, 44), 300).tolist() == [299]
    with pytest.raises((ValueError, TypeError)):
        unpack(text, 300)


def test_rows_come_back_from_a_file(tmp_path):
    write_trace(tmp_path / "x.trace")
    rows = replay_rows.read(tmp_path / "x.trace")
    assert [ids.tolist() for _, ids in rows.events()] == sum(TURNS, [])
    assert (rows.name, rows.steps.tolist(), rows.sets.tolist()) == (
        "x", [0, 0, 1, 1, 2, 2], [0, 1] * 3,
    )  # fmt: skip
    assert rows.hits.tolist() == [1, 1, 1, 0, 3, 0]
    assert rows.rooms().tolist() == [[4, 200]] * 2 + [[5, 7]] * 4
    assert [now.tolist() for now in rows.resized[1]] == [[3, 100], [5, 7]]
    assert replay_traces.read(tmp_path / "x.trace").resized == {1: [(1,), (2,)]}


def test_a_trace_that_knows_of_no_rows_is_read(tmp_path):
    write_trace(tmp_path / "x")
    first, *lines = (tmp_path / "x").read_text().splitlines()
    header = {k: v for k, v in json.loads(first).items() if not k.startswith("ro")}
    steps = [{k: v for k, v in json.loads(line).items() if k != "rows"} for line in lines]
    old = [header | {"edgemem_trace": 1}, *steps]
    (tmp_path / "old").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert replay_rows.read(tmp_path / "old") is None
    assert replay_traces.read(tmp_path / "old").n_steps == 3
    assert tracefile.popularity(tmp_path / "old", HEADER.layer_of).tolist() == [3, 0]


def test_a_trace_of_a_later_version_is_told_from_what_is_none(tmp_path):
    later = '{"edgemem_trace":%d}\n' % (tracefile.VERSION + 1)
    for text, expected in ((later, "version 3.*update edgemem"), ("{}\n", "it is no trace")):
        (tmp_path / "x").write_text(text)
        with pytest.raises(StoreError, match=expected):
            tracefile.read(tmp_path / "x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"row_counts": [9]}, {"row_counts": [9, 0]}, {"row_counts": [1 << 62] * 2},
        {"row_counts": 7}, {"row_counts": "many"}, {"row_counts": [[9], [300]]},
        {"room": []}, {"room": [0, 200]}, {"room": [4, 301]}, {"room": [4.5, 2]},
        {"room": None}, {"room": [4, 10**30]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_headers_are_errors(tmp_path, wrong):
    write_trace(tmp_path / "x")
    first, rest = (tmp_path / "x").read_text().split("\n", 1)
    (tmp_path / "x").write_text(json.dumps(json.loads(first) | wrong) + "\n" + rest)
    with pytest.raises(StoreError, match="reading .*x"):
        replay_rows.read(tmp_path / "x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"sets": [0, 2]}, {"sets": [0, -1]}, {"sets": [0]}, {"sets": ["0", "1"]}, {"sets": 3},
        {"sets": [0, 0.5]}, {"ids": [pack([9]), pack([])]},
        {"ids": ["", ""]}, {"ids": [[1], [2]]}, {"ids": None}, {"hits": [1]},
        {"hits": ["a", "b"]}, {"hits": [0.5, 1]}, {"hits": [10**30, 1]}, {"hits": [[1], [2, 3]]},
        {"resized": [[4]]}, {"resized": [[4, 0]]}, {"resized": [4]}, {"resized": {"a": 1}},
        {"resized": [[10, 7]]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_steps_are_errors(tmp_path, wrong, monkeypatch, capsys):
    write_trace(tmp_path / "x")
    *lines, last = (tmp_path / "x").read_text().splitlines()
    last = json.loads(last)
    last["rows"] |= wrong
    (tmp_path / "x").write_text("\n".join([*lines, json.dumps(last)]) + "\n")
    monkeypatch.setattr("sys.argv", ["replay", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="^error: reading .*rows.*[^\n]$"):
        replay.main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("step", ["3", '{"rows":3}', '{"rows":[1]}', "[" * 100_000])
def test_lines_that_are_no_steps_are_errors(tmp_path, step):
    write_trace(tmp_path / "x")
    with open(tmp_path / "x", "a") as file:
        file.write(step + "\n")
    with pytest.raises(StoreError, match="reading "):
        replay_rows.read(tmp_path / "x")


def test_bundles_that_are_none_are_an_error(tmp_path):
    for ids in ([2], [-1], [1 << 40]):
        writer = TraceWriter(tmp_path / "x", HEADER)
        writer.demand(0, ids)
        writer.step("decode", 1)
        writer.close()
        with pytest.raises(StoreError, match="no trace"):
            replay_traces.read(tmp_path / "x")


demands = st.lists(st.sets(st.integers(0, 7), max_size=6).map(sorted), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(demands, st.integers(1, 8))
def test_lru_does_what_an_ordered_dict_does(demand, room):
    cache, expected = OrderedDict(), []
    for ids in demand:
        hits = 0
        for first in range(0, len(ids), room):
            part = ids[first : first + room]
            hits += sum(i in cache for i in part)
            for i in part:
                cache[i] = True
                cache.move_to_end(i)
            while len(cache) > room:
                cache.popitem(last=False)
        expected.append(hits)
    rows = rows_of(demand)
    assert replay_rows.lru(rows, np.array([room])).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(demands, st.integers(1, 8))
def test_nothing_beats_belady_and_all_room_misses_once(demand, room):
    rows = rows_of(demand)
    room = np.array([room])
    best = replay_rows.best(rows, np.broadcast_to(room, (len(demand), 1)))
    for found in (replay_rows.lru(rows, room), replay_rows.hits_of(rows, room)):
        assert found.sum() <= best.sum()
        assert (found <= np.diff(rows.starts)).all()
        if room == 8:
            assert found.tolist() == best.tolist()


def test_what_was_used_often_or_of_late_has_a_place():
    often, others = [0, 1], [[2 + i % 6] for i in range(40)]
    rows = rows_of(sum(([often, ids] for ids in others), []))
    hits = replay_rows.hits_of(rows, np.array([3]))
    assert (hits[2::2] == 2).all() and (hits[1::2] == 0).all()
    assert replay_rows.hits_of(rows, np.array([3]), {1: [np.array([8])]}).sum() > hits.sum()
