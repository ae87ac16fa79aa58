"""What each layer's feed-forward networks read while tokens run, kept in a file without a name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .engine import Engine
from .errors import StoreError, UnsupportedError


class Recording:
    """float32 [layers, tokens, hidden], on disk rather than in the memory that a budget counts."""

    def __init__(self, folder: Path, layers: int, tokens: int, hidden: int):
        """Raises StoreError where the folder has no room for it."""
        self.layers, self._shape = layers, (tokens, hidden)
        size = 4 * layers * tokens * hidden
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, it ends with this
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, max(size, 1))
        except OSError as error:
            raise StoreError(
                f"recording what networks read, {size:,} bytes in {folder}: {error.strerror}; free "
                "some space, choose another folder for the new store, or a smaller limit"
            ) from None

    def put(self, layer: int, first: int, inputs: np.ndarray) -> None:
        """Tokens from `first` on, [n, hidden]."""
        self._file.seek(self._offset(layer, first))
        self._file.write(np.ascontiguousarray(inputs, np.float32).data)

    def inputs(self, layer: int, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [first, stop) of a layer, [n, hidden]. Raises UnsupportedError for what is not
        finite."""
        tokens, hidden = self._shape
        count = (tokens if stop is None else stop) - first
        self._file.seek(self._offset(layer, first))
        found = np.frombuffer(self._file.read(4 * count * hidden), np.float32)
        if not np.isfinite(found).all():
            raise UnsupportedError(
                f"calibrating: what layer {layer} reads is not finite; the model's numbers "
                "overflow in this format, try another --dtype when converting"
            )
        return found.reshape(count, hidden)

    def _offset(self, layer: int, token: int) -> int:
        tokens, hidden = self._shape
        return 4 * hidden * (layer * tokens + token)


@contextmanager
def recording(engine: Engine, count: int, folder: Path, every: int = 1) -> Iterator[Recording]:
    """Record one in `every` of the `count` tokens that run meanwhile."""
    spec, done = engine.spec, 0
    recorded = Recording(folder, spec.n_layers, -(-count // every), spec.hidden)

    def watch(layer: int, inputs: np.ndarray) -> None:
        nonlocal done
        recorded.put(layer, -(-done // every), inputs[-done % every :: every])
        done += len(inputs) if layer == spec.n_layers - 1 else 0

    engine.watch(watch)
    try:
        yield recorded
    finally:
        engine.watch(None)
