"""Where neurons lie: each once, friends beside friends, within the part that is decided about."""

import numpy as np
import pytest

from edgemem.predictors import placement


def teams(seed: int, width: int, tokens: int = 400, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Activity of neurons that come in teams, and each neuron's team."""
    random = np.random.default_rng(seed)
    team = random.permutation(np.arange(width) // size)
    plays = random.random((tokens, width // size + 1)) < 0.05
    return plays[:, team] & (random.random((tokens, width)) < 0.9), team


@pytest.mark.parametrize("width", (1, 7, 150, 1024, 2500, 5000))
def test_each_neuron_has_one_place(width, seed_base):
    active, _ = teams(seed_base + 1, width)
    assert sorted(placement.order(active).tolist()) == list(range(width))


def test_friends_are_neighbours(seed_base):
    active, team = teams(seed_base + 2, 600)
    order = placement.order(active)
    together = (team[order][1:] == team[order][:-1]).mean()
    by_chance = (team[1:] == team[:-1]).mean()
    assert by_chance < 0.05 < 0.6 < together


def test_parts_keep_their_places(seed_base):
    """As many parts as reads begin in, while the next is decided about (native/neurons.c)."""
    active, _ = teams(seed_base + 3, 5000)
    order = placement.order(active)
    for start, end in ((0, 1024), (1024, 2048), (2048, 3072), (3072, 5000)):
        assert sorted(order[start:end].tolist()) == list(range(start, end))


def test_neurons_that_are_mostly_active_stay_where_they_are(seed_base):
    active = np.random.default_rng(seed_base).random((300, 200)) < 0.5
    assert placement.order(active).tolist() == list(range(200))


def test_neurons_that_are_never_active_have_places_too():
    active = np.zeros((50, 90), bool)
    assert sorted(placement.order(active).tolist()) == list(range(90))
