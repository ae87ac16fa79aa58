"""Policies against their definitions, computed the slow way from the whole history."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemem import policies
from edgemem.policies import POLICIES, Lfu, Lru, NextUse, Static, next_use, recency

N_LAYERS, N_EXPERTS = 6, 4
ROUTED = (0, 1, 4)
LAYER_OF = np.repeat(ROUTED, N_EXPERTS)


@st.composite
def histories(draw, max_steps=12):
    """Steps of (tokens, for each routed layer: {bundle: uses})."""
    steps = []
    for _ in range(draw(st.integers(1, max_steps))):
        tokens = draw(st.sampled_from([1, 1, 2, 3, 500]))
        layers = {}
        for place, layer in enumerate(ROUTED):
            experts = draw(st.sets(st.integers(0, N_EXPERTS - 1)))
            bundles = [place * N_EXPERTS + e for e in sorted(experts)]
            layers[layer] = {bundle: draw(st.integers(1, tokens)) for bundle in bundles}
        steps.append((tokens, layers))
    return steps


def long_history(random: np.random.Generator, steps: int):
    """Single tokens that take two experts of each layer, the last expert of each ever less."""
    odds = np.array([4, 3, 2, 1e-3])
    take = lambda: np.sort(random.choice(N_EXPERTS, 2, False, odds / odds.sum())).tolist()
    for _ in range(steps):
        yield (
            1,
            {
                layer: dict.fromkeys((place * N_EXPERTS + e for e in take()), 1)
                for place, layer in enumerate(ROUTED)
            },
        )


def run(policy, history, until=None):
    """Show a history to a policy, uses only where they are not all 1; yields (step, layer, ranks)
    after each layer."""
    for step, (tokens, layers) in enumerate(history):
        for layer, uses in layers.items():
            ids, counts = np.array(list(uses), np.uint32), np.array(list(uses.values()), np.int32)
            policy.observe(layer, ids, None if (counts == 1).all() else counts, tokens)
            yield step, layer, policy.ranks(layer)


def make(kind):
    return policies.build(kind.name, LAYER_OF, N_LAYERS, np.arange(len(LAYER_OF)))


@pytest.mark.parametrize("kind", POLICIES.values(), ids=POLICIES)
def test_ranks_are_float32_one_for_each_bundle(kind):
    policy = make(kind)
    policy.observe(1, np.array([5, 6], np.uint32))
    ranks = policy.ranks(1)
    assert ranks.dtype == np.float32 and ranks.shape == LAYER_OF.shape
    assert np.isfinite(ranks).all()
    assert type(policy) is kind


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="'mru' is none of next-use, lru, lfu, static"):
        policies.build("mru", LAYER_OF, N_LAYERS)
    with pytest.raises(ValueError, match="needs a profile"):
        policies.build("static", LAYER_OF, N_LAYERS)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_lru_ranks_by_last_use(history):
    last, clock = dict.fromkeys(range(len(LAYER_OF)), 0), 0
    for step, layer, ranks in run(make(Lru), history):
        clock += 1
        last.update(dict.fromkeys(history[step][1][layer], clock))
        assert ranks.tolist() == [last[i] for i in range(len(LAYER_OF))]


@settings(max_examples=60, deadline=None)
@given(histories())
def test_lfu_ranks_by_uses(history):
    count = np.zeros(len(LAYER_OF))
    for step, layer, ranks in run(make(Lfu), history):
        for bundle, uses in history[step][1][layer].items():
            count[bundle] += uses
        assert ranks.tolist() == count.tolist()


def expected_next_use(history):
    """The definition, in float64 and loop by loop: after every layer, when each bundle is expected
    to be used next (n_layers / p after its layer's last turn)."""
    keep = 0.5 ** (1 / np.array(next_use.HALF_LIVES))
    shares, rates = np.array(next_use.SHARES), np.zeros((len(keep), len(LAYER_OF)))
    moment = np.array(LAYER_OF) + N_LAYERS * (1 / next_use.PRIOR - 1)
    seen = np.zeros(N_LAYERS)
    for step, (tokens, layers) in enumerate(history):
        for layer, uses in layers.items():
            if seen[layer] and uses:
                credit = np.zeros(len(keep))
                for bundle, count in uses.items():
                    expected = rates[:, bundle] / (1 - keep ** seen[layer]) + next_use.LEAST_RATE
                    credit += count * shares * expected / (shares @ expected)
                shares = shares + next_use.LEARNING * (credit / sum(uses.values()) - shares)
            seen[layer] += tokens
            for bundle in np.flatnonzero(np.array(LAYER_OF) == layer):
                used = uses.get(int(bundle), 0) / tokens
                rates[:, bundle] = rates[:, bundle] * keep**tokens + (1 - keep**tokens) * used
                p = shares @ (rates[:, bundle] / (1 - keep ** seen[layer])) + next_use.PRIOR
                moment[bundle] = step * N_LAYERS + layer + N_LAYERS / p
            yield moment.copy()


@pytest.mark.parametrize("longest_clock", [1 << 14, 2 * N_LAYERS])
@settings(max_examples=60, deadline=None)
@given(history=histories())
def test_next_use_ranks_by_the_expected_time_of_the_next_use(longest_clock, history):
    assert_ranked_by_next_use(longest_clock, history)


@pytest.mark.parametrize("seed", range(2))
def test_next_use_ranks_so_after_many_steps(seed):
    """Long enough for rates to fade to nothing, and for the clock to be set back as it is."""
    assert_ranked_by_next_use(1 << 14, list(long_history(np.random.default_rng(seed), 3000)))


def assert_ranked_by_next_use(longest_clock, history):
    """Ranks are minus the expected moments, on a clock that is now and then set back by whole
    cycles, to within 1e-5 and what float32 can tell apart on that clock."""
    saved, next_use._LONGEST_CLOCK = next_use._LONGEST_CLOCK, longest_clock
    try:
        policy = make(NextUse)
    finally:
        next_use._LONGEST_CLOCK = saved
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * N_LAYERS + longest_clock * 2.0**-23}
    found = run(policy, history)
    for (_, _, ranks), expected in zip(found, expected_next_use(history), strict=True):
        cycles = np.rint(np.median(ranks + expected) / N_LAYERS)
        assert np.allclose(ranks, cycles * N_LAYERS - expected, **tolerance)
        assert -ranks.min() < longest_clock + N_LAYERS * (1 / next_use.PRIOR + 1)


def test_next_use_refuses_what_is_not_the_layers():
    """And nothing has happened: the core checks what it would otherwise write beside its arrays."""
    policy = make(NextUse)
    policy.observe(1, np.array([4]))
    before = policy.ranks(1).copy()
    for layer, ids in ((1, [4, 8]), (1, [3]), (4, [12]), (4, [-1]), (2, [4]), (-1, []), (6, [])):
        with pytest.raises(AssertionError):
            policy.observe(layer, np.array(ids, np.int64))
    with pytest.raises(AssertionError):
        policy.observe(1, np.array([4, 5]), np.array([1]))
    assert np.array_equal(policy.ranks(1), before)


@pytest.mark.parametrize("kind", POLICIES.values(), ids=POLICIES)
def test_policies_take_ids_and_uses_of_any_integer_type_and_stride(kind):
    plain, other = make(kind), make(kind)
    ids, uses = np.array([4, 6, 7]), np.array([1, 3, 2])
    for wanted in (np.int64, np.uint32, np.int32):
        plain.observe(1, ids, uses, 3)
        strided = np.repeat(ids, 2).astype(wanted)[::2]
        other.observe(1, strided, np.repeat(uses, 2).astype(wanted)[::2], 3)
        assert np.array_equal(plain.ranks(1), other.ranks(1))


def test_a_use_by_all_tokens_of_a_chunk_counts_as_that_many_tokens():
    one, chunk = make(NextUse), make(NextUse)
    for _ in range(4):
        one.observe(0, np.array([2], np.uint32))
    chunk.observe(0, np.array([2], np.uint32), np.array([4]), tokens=4)
    assert np.allclose(one._rates[:, 2], chunk._rates[:, 2], rtol=1e-5)


def test_static_keeps_to_its_profile():
    policy = make(Static)
    before = policy.ranks(0).copy()
    policy.observe(0, np.array([0, 1], np.uint32))
    assert np.array_equal(policy.ranks(2), before)
    with pytest.raises(ValueError, match="the profile ranks 3 bundles, the model has 12"):
        Static(LAYER_OF, N_LAYERS, np.ones(3))


def test_lru_keeps_its_order_when_it_renumbers(monkeypatch):
    monkeypatch.setattr(recency, "LARGEST_COUNT", 20.0)
    random = np.random.default_rng(5)
    policy, last = make(Lru), np.zeros(len(LAYER_OF))
    for clock in range(1, 200):
        ids = np.unique(random.integers(0, len(LAYER_OF), 2))
        policy.observe(0, ids)
        last[ids] = clock
        assert policy.ranks(0).max() <= 20
        assert np.array_equal(np.unique(last, return_inverse=True)[1], rank_order(policy))


def rank_order(policy) -> np.ndarray:
    return np.unique(policy.ranks(0), return_inverse=True)[1]


def test_layers_without_bundles_count_as_distance():
    """Layers 0 and 3 of 5 are routed: seen from 0, layer 3 is 3 away and layer 0 is 5 away."""
    policy = NextUse(np.array([0, 0, 3, 3]), 5)
    policy.observe(0, np.array([], np.uint32))
    ranks = policy.ranks(0)
    assert ranks[2] - ranks[0] == pytest.approx(2)
