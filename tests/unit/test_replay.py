"""The replay of traces: Belady against all possible choices, caches against dicts, both formats."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemem import tracefile
from edgemem.errors import EdgeMemError, StoreError
from edgemem.policies import POLICIES, Lru, NextUse, Policy
from edgemem.tracefile import TraceHeader, TraceWriter

pytest.importorskip("numba", reason="the replay needs numba: pip install edgemem[bench]")

from bench import replay, replay_traces, synth
from bench import routing as routing_check
from bench.replay_cache import Belady, hit_rate, simulate


def routing(demands: list[list[int]], n_layers=1, n_bundles=6, class_of=None):
    """Events of one layer each, layers taking turns; bundles are spread evenly over them."""
    events = range(len(demands))
    return replay_traces._build(
        "test", n_layers, np.sort(np.arange(n_bundles) % n_layers), class_of,
        [e % n_layers for e in events], [e // n_layers for e in events], [1] * len(demands),
        demands, None,
    )  # fmt: skip


demands = st.lists(
    st.sets(st.integers(0, 5), min_size=1, max_size=2).map(sorted), min_size=1, max_size=9
)


def most_hits(demands: list[list[int]], slots: int) -> int:
    """The best that any choice of victims gives, by trying all of them."""
    states = {frozenset(): 0}
    for wanted in map(frozenset, demands):
        following: dict[frozenset, int] = {}
        for state, hits in states.items():
            rest = state - wanted
            kept = min(len(rest), slots - len(wanted))
            for choice in combinations(sorted(rest), kept):
                new = wanted | frozenset(choice)
                following[new] = max(following.get(new, 0), hits + len(state & wanted))
        states = following
    return max(states.values())


@settings(max_examples=150, deadline=None)
@given(demands, st.integers(2, 4))
def test_belady_is_the_best_of_all_choices(demands, slots):
    r = routing(demands)
    assert simulate(r, Belady(r), (slots,)).sum() == most_hits(demands, slots)


class ByRank:
    """A cache by the rules, on a dict: what `serve` must do, one class at a time."""

    def __init__(self, class_of, slots):
        self.resident, self.class_of, self.slots = set(), class_of, slots

    def serve(self, ids, ranks) -> int:
        hits = len(self.resident & set(ids))
        for i in ids:
            same = [j for j in self.resident if self.class_of[j] == self.class_of[i]]
            if i not in self.resident and len(same) == self.slots[self.class_of[i]]:
                self.resident.remove(min(set(same) - set(ids), key=lambda j: (ranks[j], j)))
            self.resident.add(i)
        return hits


class Random(Policy):
    """Ranks without sense, many of them equal."""

    name = "random"

    def observe(self, layer, ids, uses=None, tokens=1):
        random = np.random.default_rng([layer, *ids])
        self._ranks = random.integers(0, 3, len(self.layer_of)).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(demands, st.tuples(st.integers(2, 3), st.integers(2, 3)))
def test_the_cache_does_what_a_dict_does(demands, slots):
    r = routing(demands, class_of=[0, 1, 0, 1, 0, 1])
    policy, cache = Random(r.layer_of, 1), ByRank(r.class_of, slots)
    expected = []
    for wanted in demands:
        policy.observe(0, np.array(wanted))
        expected.append(cache.serve(wanted, policy.ranks(0)))
    assert simulate(r, Random(r.layer_of, 1), slots).tolist() == expected


def test_demand_beyond_the_slots_is_served_in_parts():
    r = routing([[0, 1, 2, 3, 4], [3, 4], [0, 1]])
    assert simulate(r, Lru(r.layer_of, 1), (2,)).tolist() == [0, 2, 0]
    r = routing([[0, 1, 2, 3], [2, 3]])
    assert simulate(r, Lru(r.layer_of, 1), (2,)).tolist() == [0, 2]
    with pytest.raises(ValueError, match="holds nothing"):
        simulate(r, Lru(r.layer_of, 1), (0,))


def test_a_dense_model_streamed_in_layer_order_hits_as_much_as_belady():
    """Ten layers, one bundle each, six slots: LRU has always just evicted what comes next."""
    r = routing([[e % 10] for e in range(300)], n_layers=10, n_bundles=10)
    assert simulate(r, Lru(r.layer_of, 10), (6,)).sum() == 0
    best = hit_rate(r, simulate(r, Belady(r), (6,)), 5)
    assert hit_rate(r, simulate(r, NextUse(r.layer_of, 10), (6,)), 5) >= best - 0.04
    assert best > 0.5


def test_below_one_token_cycle_the_default_still_hits():
    random = np.random.default_rng(3)
    popular = 1 / np.arange(1, 9)
    picks = [
        [sorted(random.choice(8, 2, replace=False, p=popular / popular.sum())) for _ in range(6)]
        for _ in range(80)
    ]
    r = replay_traces.of_tokens("skewed", np.array(picks), 8)
    assert hit_rate(r, simulate(r, Lru(r.layer_of, 6), (10,)), 20) < 0.05
    assert hit_rate(r, simulate(r, NextUse(r.layer_of, 6), (10,)), 20) > 0.25


@pytest.mark.parametrize("name", replay.PUBLISHED)
def test_published_traces_give_the_published_rates(shared, name):
    r = replay_traces.read(shared / "traces" / f"{name}.route.csv.xz")
    for share, published in replay.PUBLISHED[name].items():
        rates = replay.compare(r, share)
        assert (rates["lru"], rates["belady"]) == pytest.approx(published, abs=0.01)
        assert max(rates.values()) == rates["belady"]
        assert rates["next-use"] >= rates["lru"] - 0.005


# --- Trace files ----------------------------------------------------------------------------------

HEADER = TraceHeader("qwen3_moe", "lru", 2, (0, 0, 1, 1), (0, 0, 0, 0), (2,))


def write_trace(path, hits):
    writer = TraceWriter(path, HEADER)
    for step, (tokens, layers) in enumerate([(3, [[0, 1], [2]]), (1, [[1], [3]]), (1, [[1], [2]])]):
        for layer, ids in enumerate(layers):
            uses = [tokens] * len(ids) if tokens > 1 else None
            writer.demand(layer, np.array(ids, np.uint32), uses, hits=hits[2 * step + layer])
        writer.step("prefill" if tokens > 1 else "decode", tokens)
    writer.close()


def test_a_trace_of_our_own_replays_to_the_hits_that_it_recorded(tmp_path, capsys):
    write_trace(tmp_path / "run.jsonl", [0, 0, 1, 0, 0, 0])
    r = replay_traces.read(tmp_path / "run.jsonl")
    assert (r.n_steps, r.slots, r.policy) == (3, (2,), "lru")
    assert r.tokens.tolist() == [3, 3, 1, 1, 1, 1]
    assert r.uses.tolist() == [3, 3, 3, 1, 1, 1, 1]
    replay.show_again(r)
    same = (replay.again(r) == r.hits).sum()
    assert f"hits are equal in {same} of 6" in capsys.readouterr().out
    expected = simulate(r, Lru(r.layer_of, 2), (2,))
    assert np.array_equal(replay.again(r), expected)


def test_a_trace_that_was_cut_off_is_read_up_to_there(tmp_path):
    path = tmp_path / "run.jsonl"
    write_trace(path, [0] * 6)
    path.write_bytes(path.read_bytes()[:-5])
    assert replay_traces.read(path).n_steps == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        "not json\n",
        "[" * 100000 + "\n",
        '{"edgemem_trace":1}\n',
        '{"edgemem_trace":2}\n',
        "3\n",
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(StoreError, match="reading "):
        tracefile.read(tmp_path / "x")


def test_a_class_of_few_bundles_has_a_slot_at_every_share(tmp_path, capsys, monkeypatch):
    header = TraceHeader("qwen3_moe", "lru", 2, (0, 0, 0, 1), (0, 0, 0, 1), (2, 1))
    with_head = TraceWriter(tmp_path / "x", header)
    for demand in ([0, 1], [2]), ([1], [0]), ([1], [0]):
        for ids in demand:
            with_head.demand(0, ids, hits=0)
        with_head.demand(1, [3], hits=0)
        with_head.step("decode", 1)
    with_head.close()
    assert replay_traces.read(tmp_path / "x").slots_of(0.4) == (1, 1)
    monkeypatch.setattr("sys.argv", ["replay", str(tmp_path / "x")])
    replay.main()
    assert capsys.readouterr().out.count("| x |") == len(replay.SHARES)


@pytest.mark.parametrize("name", ["x", "x.route.csv.xz", "nowhere", "nowhere.csv.xz"])
def test_a_replay_of_what_is_no_trace_is_an_error_in_one_line(tmp_path, monkeypatch, capsys, name):
    if "x" == name[0]:
        (tmp_path / name).write_text("garbage\n")
    monkeypatch.setattr("sys.argv", ["replay", str(tmp_path / name)])
    with pytest.raises(SystemExit, match="^error: reading .*[^\n]$"):
        replay.main()
    assert capsys.readouterr().out == ""


def test_a_trace_replaces_a_trace_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.touch()
    for _ in range(2):  # an empty file, then a trace
        TraceWriter(path, HEADER).close()
        assert tracefile.read(path)[0] == HEADER
    path.write_bytes(b"GGUF and all its weights")
    with pytest.raises(EdgeMemError, match="something else than a trace.*choose another file"):
        TraceWriter(path, HEADER)
    assert path.read_bytes() == b"GGUF and all its weights"


def test_unknown_counters_are_refused(tmp_path):
    writer = TraceWriter(tmp_path / "x", HEADER)
    with pytest.raises(ValueError, match="luck is none of hits"):
        writer.demand(0, [1], luck=3)
    writer.close()


def test_the_routing_of_a_model_is_recorded_token_by_token(tmp_path):
    config = synth.config_of("olmoe-1b-7b", 3) | {
        "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts": 16, "num_experts_per_tok": 3, "vocab_size": 300,
    }  # fmt: skip
    synth.write(config, tmp_path / "m.edgemem", "q8_0")
    r = routing_check.record(str(tmp_path / "m.edgemem"), 40)
    assert r.n_steps == 40 and np.diff(r.starts).tolist() == [3] * 120
    assert np.array_equal(r.ids // 16, np.repeat(r.layers, 3))
    assert (np.diff(r.ids.reshape(-1, 3)) > 0).all()
    rates = routing_check.hit_rates(r)
    assert all(rates["lru", s] <= rates["belady", s] + 1e-9 for s in routing_check.SHARES)


def test_every_policy_can_be_replayed():
    r = routing([[0, 1], [2], [0]])
    assert [p.name for p in replay.policies(r)] == [*POLICIES, "belady"]
