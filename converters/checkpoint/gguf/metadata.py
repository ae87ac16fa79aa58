"""Typed access to a GGUF file's metadata; every fault is a CheckpointError that names the key."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from edgemem.errors import CheckpointError, UnsupportedError

from .header import Strings


class Metadata:
    """The keys of a file. A key that starts with a dot belongs to the file's architecture.

    Where a default is given, an absent key has it; without one the key must be there.
    """

    def __init__(self, path: Path, values: dict[str, object]):
        self.path = path
        self._values = values
        self.architecture = self.text("general.architecture")

    def __contains__(self, key: str) -> bool:
        return self._full(key) in self._values

    def _full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key

    def _get(self, key: str, default: tuple):
        value = self._values.get(self._full(key))
        if value is None and not default:
            raise CheckpointError(f"reading {self.path}: it lacks the key {self._full(key)}")
        return default[0] if value is None else value

    def error(self, key: str, what: str) -> CheckpointError:
        """To be raised where the value of a key is wrong."""
        value = self._values.get(self._full(key))
        return CheckpointError(f"reading {self.path}: {self._full(key)} = {value!r:.80} {what}")

    def unsupported(self, key: str, supported: str) -> UnsupportedError:
        """To be raised where the value of a key asks for what this version cannot do."""
        value = self._values.get(self._full(key))
        return UnsupportedError(
            f"reading {self.path}: {self._full(key)} = {value!r:.80} is not supported; "
            f"supported: {supported}"
        )

    def text(self, key: str, *default: str | None) -> str:
        if default and key not in self:
            return default[0]
        value = self._get(key, ())
        if not isinstance(value, str):
            raise self.error(key, "is no text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key, ())
        try:
            value = value.tolist() if isinstance(value, Strings) else value
        except UnicodeDecodeError as error:
            what = f"{self._full(key)} is not UTF-8 ({error.reason})"
            raise CheckpointError(f"reading {self.path}: {what}") from None
        if not isinstance(value, list):
            raise self.error(key, "is no array of texts")
        return value

    def flag(self, key: str, *default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, "is neither true nor false")
        return value

    def count(self, key: str, *default: int | None) -> int:
        """A whole number; an array of equal ones (some files have one a layer) counts as one."""
        if default and key not in self:
            return default[0]
        value = self._get(key, ())
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
            if (value != value[0]).any():
                raise self.unsupported(key, "one number for all layers")
            value = int(value[0])
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self.error(key, "is no whole number from 0 to 2^31")
        return value

    def number(self, key: str, *default: float | None) -> float:
        """A finite number. A 32-bit float is given as the shortest decimal that it rounds from,
        which is what the original config said: 1e-05, not 9.999999747378752e-06."""
        if default and key not in self:
            return default[0]
        value = self._get(key, ())
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(key, "is no finite number")
        if type(value) is float and abs(value) < 3e38 and float(np.float32(value)) == value:
            value = float(str(np.float32(value)))
        return float(value)

    def numbers(self, key: str, kinds: str, length: int) -> np.ndarray:
        """An array of `length` numbers of one of the given kinds of dtype ("iu", "f")."""
        value = self._get(key, ())
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise self.error(key, "is no array of numbers of the right kind")
        if len(value) != length:
            raise self.error(key, f"has {len(value)} items; there are {length} tokens")
        return value

    def token_id(self, name: str, vocab: int, default: int | None = None) -> int | None:
        """tokenizer.ggml.<name>_token_id; None where it is beyond the vocabulary."""
        value = self.count(f"tokenizer.ggml.{name}_token_id", default)
        return value if value is not None and value < vocab else None
