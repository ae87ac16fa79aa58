"""Where neurons lie in a store: those that are often active together as neighbours.

What is absent of a token's neurons is read in one batch, and neighbours among them in one read.
Each neuron has one place: copies beside each of its friends were found to load the hot ones again
and again (LLM in a flash, arXiv 2312.11514, appendix D).
"""

from itertools import pairwise

import numpy as np

from .._native import lib

MOST_ACTIVE = 0.2
"""Where more are, what is absent lies close in any order, and rounds want the one of ids."""
_DIMENSIONS = 24
_WEIGHT_OF_RARE = 1e-3


def order(active: np.ndarray) -> np.ndarray:
    """Neurons in the order of their places, int64 [width], for `active` bool [n, width] by token.

    Reads begin while the last of the neurons are yet to be decided about, in parts: each
    keeps its own places, or few of a neuron's neighbours would be known by then.
    """
    if active.mean() > MOST_ACTIVE:
        return np.arange(active.shape[1])
    ends = pairwise([0, *part_ends(active.shape[1])])
    return np.concatenate([first + _walk(active[:, first:end]) for first, end in ends])


def part_ends(width: int) -> list[int]:
    """Where the parts end in which so many neurons are decided about (em_neurons_run)."""
    chunk = lib.EM_NEURON_CHUNK
    chunks = -(-width // chunk)
    parts = min(lib.EM_NEURON_PARTS, chunks)
    return [min(width, (part + 1) * chunks // parts * chunk) for part in range(parts)]


def _walk(active: np.ndarray) -> np.ndarray:
    """A walk from the most frequent to the one most alike that has no place yet, and so on. Alike
    are those whose activity points the same way in the few directions that most of it has. Takes
    48 · width² operations.
    """
    width = active.shape[1]
    share = active.mean(axis=0, dtype=np.float32)
    activity = (active - share) / np.sqrt(share * (1 - share) + np.float32(_WEIGHT_OF_RARE))
    some = np.random.default_rng(0).standard_normal((width, _DIMENSIONS), np.float32)
    directions = np.linalg.qr(activity @ (activity.T @ (activity @ some)))[0]
    alike = activity.T @ directions
    alike /= np.linalg.norm(alike, axis=1, keepdims=True) + 1e-9
    taken, walk = np.zeros(width, np.float32), np.empty(width, np.int64)
    at = int(share.argmax())
    for i in range(width):
        walk[i], taken[at] = at, -np.inf
        at = int((alike @ alike[at] + taken).argmax())
    return walk
