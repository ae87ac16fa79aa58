"""Which bundles are in memory, and where. Here: all of them, from open to close.

The slab is taken once, at open; each bundle's slot holds exactly its pages as they lie on flash.
"""

import numpy as np

from ._native import Slab
from .store import Store


class Residency:
    """Every bundle of a store in one slab: `addresses` uint64 and `sizes` int64 [n_bundles].

    Opening reads the whole payload once and checks each bundle's checksum. Raises MemoryError,
    CorruptError, FlashError.
    """

    def __init__(self, store: Store, progress=None):
        self.sizes = sizes = store.entries["page_count"].astype(np.int64) * store.page_size
        starts = np.concatenate(([0], np.cumsum(sizes)))
        self._slab = Slab(int(starts[-1]))
        self.addresses = self._slab.address + starts[:-1].astype(np.uint64)
        for bundle in range(len(sizes)):
            start, stop = int(starts[bundle]), int(starts[bundle + 1])
            store.read(bundle, self._slab.view[start:stop])
            if progress is not None:
                progress(stop, self._slab.bytes)

    @property
    def bytes(self) -> int:
        return self._slab.bytes

    def prefetch(self, ids: np.ndarray) -> None:
        """Start reading bundles; never waits. All are resident, so there is nothing to start."""

    def acquire(self, ids: np.ndarray) -> np.ndarray:
        """Pin bundles and give their addresses, uint64 [n]."""
        return self.addresses[ids]

    def release(self, ids: np.ndarray) -> None:
        """Undo one `acquire` of the same ids."""
