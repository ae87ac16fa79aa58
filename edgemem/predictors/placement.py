"""Where neurons lie in a store: those that are often active together as neighbours.

What is absent of a token's neurons is read in one batch, and neighbours among them in one read.
Each neuron has one place: copies beside each of its friends were found to load the hot ones again
and again (LLM in a flash, arXiv 2312.11514, appendix D).
"""

from itertools import pairwise

import numpy as np

CHUNK, PARTS = 1024, 4
"""Neurons are decided about in so many parts of whole chunks (native/neurons.c)."""
MOST_ACTIVE = 0.2
"""Where more are, what is absent lies close in any order, and rounds want the one of ids."""
_DIMENSIONS = 24
_WEIGHT_OF_RARE = 1e-3


def order(active: np.ndarray) -> np.ndarray:
    """Neurons in the order of their places, int64 [width], for `active` bool [n, width] by token.

    Reads begin while the last of the neurons are yet to be decided about, in PARTS parts: each
    keeps its own places, or few of a neuron's neighbours would be known by then.
    """
    if active.mean() > MOST_ACTIVE:
        return np.arange(active.shape[1])
    chunks = -(-active.shape[1] // CHUNK)
    ends = [min(active.shape[1], p * chunks // PARTS * CHUNK) for p in range(PARTS + 1)]
    walks = [a + _walk(active[:, a:b]) for a, b in pairwise(ends) if b > a]
    return np.concatenate(walks)


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
