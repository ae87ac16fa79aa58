"""Sampler: the meaning of transformers' processors, ties, seeds, and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemem.errors import UnsupportedError
from edgemem.sampler import Sampler, Sampling, candidates

LOGITS = np.array([1.0, 3.0, -2.0, 3.0, 0.5, 2.0], np.float32)


def filtered(logits, sampling):
    """What may be drawn: {id: probability}."""
    ids, weights = candidates(logits, sampling)
    ids = np.arange(len(logits)) if ids is None else ids
    return dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))


def test_the_default_is_the_likeliest_and_the_lowest_id_of_equals():
    assert Sampler(Sampling()).choose(LOGITS) == 1
    assert Sampler(Sampling()).choose(np.zeros(7, np.float32)) == 0


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"top_k": 1}, {1, 3}),  # a tie with the k-th stays
        ({"top_k": 3}, {1, 3, 5}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.0}, {1}),  # of a tie the lowest id
        ({"top_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1, 3}),
        ({"min_p": 0.3}, {1, 3, 5}),
        ({"top_k": 3, "top_p": 0.7, "min_p": 0.1}, {1, 3}),
    ],
)
def test_filters(options, expected):
    assert set(filtered(LOGITS, Sampling(temperature=1.0, **options))) == expected


@pytest.mark.parametrize("vocab", [2, 50, 5000])
def test_agrees_with_transformers(vocab, rng):
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    name, why = "transformers.generation.logits_process", "the oracle needs transformers"
    process = pytest.importorskip(name, reason=why)
    for _ in range(20):
        logits = (rng.normal(size=vocab) * rng.choice([0.1, 1, 5])).astype(np.float32)
        history = rng.integers(0, vocab, rng.integers(1, 20))
        options = {
            "temperature": float(rng.choice([0.3, 1.0, 1.7])),
            "top_k": int(rng.choice([0, 1, 7, 4000])),
            "top_p": float(rng.choice([1.0, 0.95, 0.5, 0.01])),
            "min_p": float(rng.choice([0.0, 0.05, 0.5])),
            "repetition_penalty": float(rng.choice([1.0, 1.3, 0.8])),
        }
        chain = [
            process.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
            process.TemperatureLogitsWarper(options["temperature"]),
            process.TopPLogitsWarper(options["top_p"]),
            process.MinPLogitsWarper(options["min_p"]),
        ]
        if options["top_k"]:
            chain.insert(2, process.TopKLogitsWarper(options["top_k"]))
        scores, ids = torch.tensor(logits)[None], torch.tensor(history)[None]
        for processor in chain:
            scores = processor(ids, scores)
        expected = scores[0].softmax(-1).numpy()
        penalized = Sampler(Sampling(repetition_penalty=options["repetition_penalty"]))
        ours = np.zeros(vocab)
        seen = _penalize(logits, history, penalized)
        for id, share in filtered(seen, Sampling(**options)).items():
            ours[id] = share
        # A token on the very edge of top-p may fall either way by rounding; nothing else may.
        assert np.abs(ours - expected).sum() < 2e-3 + 2 * _edge(expected, ours), options


def _penalize(logits, history, sampler):
    from edgemem.sampler import _penalized

    penalty = sampler.sampling.repetition_penalty
    return _penalized(logits, history, penalty) if penalty != 1.0 else logits


def _edge(expected, ours):
    differing = (expected > 0) != (ours > 0)
    return max(expected[differing].sum(), ours[differing].sum()) if differing.sum() == 1 else 0.0


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=3000),
    st.floats(0, 1),
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_share(values, top_p):
    logits = np.array(values, np.float32)
    kept = filtered(logits, Sampling(temperature=1.0, top_p=top_p))
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    held = shares[list(kept)]
    assert held.sum() >= top_p - 1e-5
    assert held.sum() - held.min() < top_p + 1e-5 or len(kept) == 1
    if len(kept) < len(values):
        assert held.min() >= np.delete(shares, list(kept)).max() - 1e-9


def test_draws_follow_the_probabilities():
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(20000)], minlength=6) / 20000
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert np.abs(counts - expected).max() < 0.015


def test_seeds():
    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(np.zeros(1000, np.float32)) for _ in range(8)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_logits_are_left_alone_and_impossible_tokens_are_never_drawn():
    logits = np.full(100, -np.inf, np.float32)
    logits[[5, 7]] = 1.0
    before = logits.copy()
    options = {"temperature": 2.0, "top_k": 50, "top_p": 0.999, "repetition_penalty": 2.0}
    sampler = Sampler(Sampling(**options))
    assert {sampler.choose(logits, [5, 7, 7]) for _ in range(100)} == {5, 7}
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-50, 1e-30, 1e-9, 1e30])
def test_extreme_temperatures(temperature):
    logits = np.array([0.0, 5.0, 4.999], np.float32)
    chosen = {Sampler(Sampling(temperature=temperature, seed=s)).choose(logits) for s in range(40)}
    assert chosen == ({0, 1, 2} if temperature > 1 else {1})


def test_settings_may_be_numpy_numbers_and_huge_integers():
    options = {"temperature": np.float32(0.5), "top_k": 10**400, "seed": np.int64(3)}
    Sampler(Sampling(**options)).choose(LOGITS)
    Sampler(Sampling(temperature=1, seed=10**400)).choose(LOGITS)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(wrong, temperature):
    logits = LOGITS.copy()
    logits[4] = wrong
    with pytest.raises(UnsupportedError, match="not finite"):
        Sampler(Sampling(temperature=temperature)).choose(logits)


def test_a_penalty_changes_greedy_choice_too():
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    assert sampler.choose(LOGITS, [1]) == 3
    assert sampler.choose(LOGITS, [1, 3]) == 5
    assert sampler.choose(LOGITS, []) == 1


@pytest.mark.parametrize(
    "options, error",
    [
        ({"temperature": -0.1}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": float("inf")}, ValueError),
        ({"temperature": 10**400}, ValueError),
        ({"temperature": "hot"}, TypeError),
        ({"temperature": True}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_k": 2.0}, TypeError),
        ({"top_p": 1.01}, ValueError),
        ({"top_p": -0.01}, ValueError),
        ({"min_p": 2}, ValueError),
        ({"repetition_penalty": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 1.5}, TypeError),
        ({"heat": 1}, TypeError),
    ],
)
def test_refusals_name_the_field(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"repetition_penalty": 1e-40}, "from 1e-30 to 1e"),
        ({"repetition_penalty": 0}, "from 1e-30 to 1e"),
        ({"temperature": float("inf")}, "from 0 to 1e"),
        ({"temperature": float("nan")}, "from 0 to 1e"),
    ],
)
def test_both_bounds_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


def test_an_unknown_option_is_named_with_those_that_exist():
    with pytest.raises(TypeError, match="'temprature'.*temperature, top_k"):
        Sampling.of({"temprature": 1})
    assert Sampling.of({"top_k": 3}) == Sampling(top_k=3)
