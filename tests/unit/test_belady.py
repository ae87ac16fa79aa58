"""Belady's cache: against all possible choices, and against the replay's."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemem import belady


def hits(demands, class_of, slots) -> list[int]:
    ids = np.array([i for wanted in demands for i in wanted], np.int64)
    starts = np.cumsum([0, *map(len, demands)])
    found = belady.hits(starts, ids, class_of, slots)
    return [int(part.sum()) for part in np.split(found, starts[1:-1])]


def most_hits(demands, slots: int) -> int:
    """The best that any choice of victims gives, by trying all of them."""
    states = {frozenset(): 0}
    for wanted in map(frozenset, demands):
        following: dict[frozenset, int] = {}
        for state, count in states.items():
            rest = state - wanted
            for choice in combinations(sorted(rest), min(len(rest), slots - len(wanted))):
                new = wanted | frozenset(choice)
                following[new] = max(following.get(new, 0), count + len(state & wanted))
        states = following
    return max(states.values())


small = st.lists(
    st.sets(st.integers(0, 5), min_size=1, max_size=2).map(sorted), min_size=1, max_size=9
)


@settings(max_examples=200, deadline=None)
@given(small, st.integers(2, 4))
def test_no_choice_hits_more(demands, slots):
    assert sum(hits(demands, [0] * 6, [slots])) == most_hits(demands, slots)


wide = st.lists(
    st.sets(st.integers(0, 19), min_size=1, max_size=12).map(sorted), min_size=1, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(wide, st.lists(st.integers(0, 1), min_size=20, max_size=20), st.integers(2, 9))
def test_it_is_the_replays(demands, class_of, slots):
    """Event by event, also where demand exceeds the slots, and with two layout classes."""
    pytest.importorskip("numba", reason="the replay needs numba: pip install edgemem[bench]")
    from bench.replay_cache import Belady, simulate
    from bench.replay_traces import _build

    events = len(demands)
    for classes in ([0] * 20, class_of):
        routing = _build(
            "test", 1, np.zeros(20, np.int64), classes, [0] * events, range(events), [1] * events,
            demands, None,
        )  # fmt: skip
        expected = simulate(routing, Belady(routing), (slots, slots + 1)).tolist()
        assert hits(demands, classes, (slots, slots + 1)) == expected


def test_published_traces_give_the_replays_hits(shared):
    pytest.importorskip("numba", reason="the replay needs numba: pip install edgemem[bench]")
    from bench.replay_cache import Belady, simulate
    from bench.replay_traces import read

    r = read(shared / "traces" / "gptoss.route.csv.xz")
    for share in (0.1, 0.5):
        slots = r.slots_of(share)
        found = belady.hits(r.starts, r.ids, r.class_of, slots)
        hits = np.add.reduceat(found, r.starts[:-1], dtype=np.int64)
        assert np.array_equal(hits, simulate(r, Belady(r), slots))


def test_what_is_read_once_hits_never_and_what_fits_misses_once():
    assert hits([[0], [1], [2], [3]], [0] * 4, [2]) == [0, 0, 0, 0]
    assert hits([[0, 1], [2, 3]] * 3, [0] * 4, [4]) == [0, 0, 2, 2, 2, 2]
    assert hits([[0, 1, 2, 3, 4], [3, 4], [0, 1]], [0] * 5, [2]) == [0, 2, 0]


@settings(max_examples=100, deadline=None)
@given(wide, st.lists(st.integers(2, 9), min_size=40, max_size=40))
def test_slots_may_change(demands, slots):
    """Event by event; what exceeds them leaves by the time of its next use."""
    pytest.importorskip("numba", reason="the replay needs numba: pip install edgemem[bench]")
    from bench.replay_cache import Belady, simulate
    from bench.replay_traces import _build

    events = len(demands)
    routing = _build(
        "test", 1, np.zeros(20, np.int64), None, [0] * events, range(events), [1] * events, demands,
        None,
    )  # fmt: skip
    resized = {event: [(slots[event],)] for event in range(events)}
    expected = simulate(routing, Belady(routing), (slots[0],), resized).tolist()
    assert hits(demands, [0] * 20, np.array(slots[:events])[:, None]) == expected


def most_row_hits(demands, room: int) -> int:
    """The best that any choice gives where what is used may leave at once."""
    states = {frozenset(): 0}
    for wanted in map(frozenset, demands):
        following: dict[frozenset, int] = {}
        for state, count in states.items():
            there = state | wanted
            for choice in combinations(sorted(there), min(len(there), room)):
                new = frozenset(choice)
                following[new] = max(following.get(new, 0), count + len(state & wanted))
        states = following
    return max(states.values())


@settings(max_examples=200, deadline=None)
@given(small, st.integers(1, 4))
def test_no_choice_of_rows_hits_more(demands, room):
    ids = np.array([i for wanted in demands for i in wanted], np.int64)
    starts = np.cumsum([0, *map(len, demands)])
    rooms = np.full((len(demands), 1), room)
    found = belady.row_hits(starts, ids, np.zeros(6, np.int64), rooms)
    assert found.sum() == most_row_hits(demands, room)
