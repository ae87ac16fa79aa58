"""Predictors of rank R: what they recall, what they promise, and what they make of little."""

import numpy as np
import pytest

from edgemem.predictors import low_rank

HIDDEN, WIDTH, TOKENS, RANK = 96, 300, 1500, 12


def layer(seed: int, noise: float = 0.3, scale: float = 1.0, tokens: int = TOKENS):
    """Inputs, and weights most of whose variance is in few directions; about 10 % are active."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((RANK, HIDDEN)) / np.sqrt(RANK)
    weights = random.standard_normal((WIDTH, RANK)) @ directions
    weights += noise * random.standard_normal((WIDTH, HIDDEN))
    weights = (weights / np.sqrt(HIDDEN)).astype(np.float32)
    inputs = random.standard_normal((tokens, HIDDEN)).astype(np.float32)
    products = (inputs @ weights.T - 1.3).astype(np.float32)
    return low_rank.Layer(inputs, products, scale * np.maximum(products, 0)), weights


def made(seed: int, recall: float, **more):
    of, weights = layer(seed, **more)
    half = TOKENS // 2
    fit = low_rank.Fit(of.part(slice(0, half)), weights, 2, recall)
    predictor = fit.predictor(low_rank.threshold([fit], recall))
    return fit, predictor, low_rank.judge(predictor, of.part(slice(half, None)))


@pytest.mark.parametrize("recall", (0.8, 0.95, 0.99))
def test_unseen_tokens_are_recalled_as_was_asked(recall, seed_base):
    _, _, quality = made(seed_base + 1, recall)
    assert quality.recall == pytest.approx(recall, abs=0.03)
    assert quality.predicted < 0.6
    assert quality.predicted < quality.active + 0.3 * recall


def test_more_recall_takes_more_neurons(seed_base):
    shares = [made(seed_base + 2, recall)[2].predicted for recall in (0.7, 0.9, 0.99)]
    assert shares == sorted(shares) and shares[0] < 0.7 * shares[2]


def test_more_rank_takes_fewer_neurons(seed_base):
    fit, _, _ = made(seed_base + 3, 0.95, noise=1.0)
    ranks, shares = zip(*fit.curve, strict=True)
    assert list(ranks) == sorted(set(ranks))
    assert all(b < a + 0.02 for a, b in zip(shares, shares[1:], strict=False))


def test_what_a_predictor_says_of_its_quality_is_so(seed_base):
    of, weights = layer(seed_base + 4)
    fit = low_rank.Fit(of, weights, 2, 0.9)
    predictor = fit.predictor(low_rank.threshold([fit], 0.9))
    quality = low_rank.judge(predictor, of)
    scores = of.inputs.astype(np.float64) @ predictor.reduce.T @ predictor.score.T + predictor.bias
    named, active = scores > 0, of.activations > 0
    assert quality.predicted == pytest.approx(named.mean(), abs=1e-4)
    assert quality.active == pytest.approx(active.mean())
    assert quality.recall == pytest.approx((of.activations * named).sum() / of.activations.sum())
    assert quality.found == pytest.approx((named & active).sum() / active.sum(), abs=1e-3)
    assert quality.precision == pytest.approx((named & active).sum() / named.sum(), abs=1e-3)


def test_one_threshold_serves_layers_of_any_scale(seed_base):
    """Each layer's activation counts alike, however large its numbers are."""
    sizes, fits, layers = (1.0, 1000.0, 1e-3), [], []
    for i, scale in enumerate(sizes):
        of, weights = layer(seed_base + 5, scale=scale)
        layers.append(of)
        fits.append(low_rank.Fit(of, weights, 2, 0.9))
    threshold = low_rank.threshold(fits, 0.9)
    shares = [
        low_rank.judge(fit.predictor(threshold), of).predicted
        for fit, of in zip(fits, layers, strict=True)
    ]
    assert max(shares) == pytest.approx(min(shares), rel=0.02)


def test_neurons_that_never_were_active_are_never_predicted(seed_base):
    of, weights = layer(seed_base + 6)
    of.products[:, 7] = -5 + 0.01 * of.products[:, 7]
    of.activations[:, 7] = 0
    fit = low_rank.Fit(of, weights, 2, 0.99)
    predictor = fit.predictor(low_rank.threshold([fit], 0.99))
    assert not predictor.predicts(of.inputs)[:, 7].any()
    assert predictor.predicts(of.inputs).any(axis=0).mean() > 0.9
    assert all(np.isfinite(a).all() for a in (predictor.reduce, predictor.score, predictor.bias))


@pytest.mark.parametrize("tokens", (10, 40))
def test_little_text_makes_a_predictor_all_the_same(tokens, seed_base):
    of, weights = layer(seed_base + 8, tokens=tokens)
    fit = low_rank.Fit(of, weights, 2, 0.9)
    predictor = fit.predictor(low_rank.threshold([fit], 0.9))
    assert 1 <= predictor.rank <= tokens
    assert np.isfinite(predictor.bias).all()


def test_a_layer_that_is_never_active_predicts_nothing(seed_base):
    of, weights = layer(seed_base + 9)
    of.activations[:], of.products[:] = 0, -1
    fit = low_rank.Fit(of, weights, 2, 0.9)
    predictor = fit.predictor(low_rank.threshold([fit], 0.9))
    assert not predictor.predicts(of.inputs).any()
    assert low_rank.judge(predictor, of).recall == 1.0


def test_what_lies_in_few_directions_is_foretold_as_well_as_can_be(seed_base):
    """Inputs have a mean, and neurons are not worth the same: those with most activation, and few
    more, are predicted."""
    of, weights = layer(seed_base + 10, noise=0)
    shifted = of.inputs + np.float32(0.4)
    products = (shifted @ weights.T - 1.3).astype(np.float32)
    worth = np.random.default_rng(seed_base).lognormal(0, 1.5, WIDTH).astype(np.float32)
    of = low_rank.Layer(shifted, products, worth * np.maximum(products, 0))
    for recall in (0.5, 0.9):
        fit = low_rank.Fit(of, weights, 2, recall)
        found = low_rank.judge(fit.predictor(low_rank.threshold([fit], recall)), of)
        largest = np.sort(of.activations, axis=None)[::-1].cumsum(dtype=np.float64)
        least = np.searchsorted(largest, found.recall * largest[-1]) / largest.size
        assert found.recall == pytest.approx(recall, abs=0.06)  # held-back tokens are few
        assert found.predicted <= 1.03 * least and found.precision > 0.99


def test_the_rank_is_the_one_that_costs_least(monkeypatch, seed_base):
    monkeypatch.setattr(low_rank, "RANKS", (2, 4, 8, 16, 32, 48))
    of, weights = layer(seed_base + 11, noise=0.1)
    fit = low_rank.Fit(of, weights, 2, 0.95)
    rows = low_rank.ROW_COST * WIDTH * 2 * HIDDEN
    costs = {rank: rank * (HIDDEN + WIDTH) + rows * share for rank, share in fit.curve}
    rank = fit.predictor(low_rank.threshold([fit], 0.95)).rank
    assert rank == min(costs, key=costs.get) and 2 < rank < 48
