"""Hands a layer the bundles it wants, for as long as it computes with them."""

import numpy as np

from .residency import Residency


class Streamer:
    """`hold(ids)` pins bundles for the length of a with-block and gives their addresses."""

    def __init__(self, residency: Residency):
        self._residency = residency
        self._demand: list[np.ndarray] = []

    def hold(self, ids: np.ndarray) -> "_Hold":
        """A context manager that gives the addresses (uint64 [n]) of bundles `ids` (uint32 [n])."""
        self._demand.append(ids)
        return _Hold(self._residency, ids)

    def take_demand(self) -> int:
        """Bytes of the bundles held since this was last asked, counted once for each hold."""
        ids, self._demand = self._demand, []
        return int(self._residency.sizes[np.concatenate(ids)].sum()) if ids else 0


class _Hold:
    __slots__ = ("_ids", "_residency")

    def __init__(self, residency: Residency, ids: np.ndarray):
        self._residency = residency
        self._ids = ids

    def __enter__(self) -> np.ndarray:
        return self._residency.acquire(self._ids)

    def __exit__(self, *_) -> None:
        self._residency.release(self._ids)
