"""The header of a GGUF file, versions 2 and 3, little endian: metadata and the list of tensors.

    magic "GGUF" · u32 version · u64 tensors · u64 keys
    per key:    string name · u32 type · value          string: u64 bytes, then UTF-8
    per tensor: string name · u32 n · u64 dims[n] · u32 type · u64 offset
    padding to `general.alignment`, then the data

A value is a number, a bool, a string or an array (u32 item type, u64 count, items). Every length is
checked against the file and against a limit before anything is read or allocated for it, and the
header is read a few MiB ahead at a time, so that hostile files cost no more than honest ones.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgemem.errors import UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_MAX_HEADER_BYTES = 256 << 20
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_ITEMS = 1 << 22
"""Of one array; the largest real ones are the merges of a vocabulary, about half a million."""
_MAX_NAME_BYTES = 1 << 12
_MAX_DIMS = 4
_FIRST_BYTES = 1 << 20

_U64 = struct.Struct("<Q").unpack_from
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_NUMBERS = {code: np.dtype(name) for code, name in _NUMBERS.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the list of tensors: `dims` as ggml counts them, the fastest first."""

    name: str
    dims: tuple[int, ...]
    type_code: int
    offset: int


@dataclass(frozen=True)
class Strings:
    """An array of strings that nobody may ask for: a vocabulary, its merges: most of a header.

    `data` is that part of the file: u64 bytes, then UTF-8, `count` times; lengths were checked.
    """

    data: bytes
    count: int

    def tolist(self) -> list[str]:
        """Raises UnicodeDecodeError."""
        texts, at, data = [], 0, self.data
        for _ in range(self.count):
            start = at + 8
            at = start + _U64(data, at)[0]
            texts.append(data[start:at].decode())
        return texts


@dataclass(frozen=True)
class Header:
    """A header as it was read; where tensors lie is checked by who knows their types.

    Values are int, float, bool, str, `Strings`, or a numpy array of numbers.
    """

    metadata: dict[str, object]
    tensors: list[TensorInfo]
    alignment: int
    data_start: int


def parse_header(
    read: Callable[[int, int], bytes], size: int, error: Callable[[str], Exception]
) -> Header:
    """Parse the header of a file of `size` bytes.

    `read(offset, count)` gives bytes of the file, `error(what)` makes the exception to raise.
    """
    cursor = _Cursor(read, size, error)
    if size < 24 or cursor.bytes(4) != MAGIC:
        raise error("it is no GGUF file: it does not start with the letters GGUF")
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise UnsupportedError(f"{error('its bytes are in big-endian order')}; only little is read")
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{error(f'it is of version {version} of GGUF')}; versions 2 and 3 are read"
        )
    n_tensors, n_keys = cursor.u64(), cursor.u64()
    if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
        raise error(f"it should have {n_tensors} tensors and {n_keys} keys: out of range")
    metadata: dict[str, object] = {}
    for _ in range(n_keys):
        key = cursor.name("key")
        if key in metadata:
            raise error(f"the key {key!r:.200} is given twice")
        metadata[key] = cursor.value(key)
    tensors = [cursor.tensor() for _ in range(n_tensors)]
    alignment = _alignment(metadata, error)
    return Header(metadata, tensors, alignment, -(-cursor.position // alignment) * alignment)


def _alignment(metadata: dict, error) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= 1 << 20 or value & (value - 1):
        raise error(f"general.alignment = {value!r:.80} is no power of two up to 1 MiB")
    return value


class _Cursor:
    """Reads front to back; `position` is where the next thing starts in the file."""

    def __init__(self, read, size: int, error):
        self._read, self._size, self.error = read, size, error
        self._data = b""
        self.position = 0

    def _take(self, count: int) -> int:
        """Where the next `count` bytes start in the data; they are there, and are passed by."""
        start, end = self.position, self.position + count
        self._reach(end)
        self.position = end
        return start

    def _reach(self, end: int) -> None:
        """Have the data up to `end`."""
        if end > self._size:
            raise self.error("its header is longer than the file: truncated, or no GGUF file")
        if end > _MAX_HEADER_BYTES:
            raise self.error(f"its header is longer than {_MAX_HEADER_BYTES >> 20} MiB")
        have = len(self._data)
        if end > have:
            until = min(self._size, max(end, 2 * have, _FIRST_BYTES))
            self._data += self._read(have, until - have)

    def bytes(self, count: int) -> bytes:
        start = self._take(count)
        return self._data[start : start + count]

    def u32(self) -> int:
        return int.from_bytes(self.bytes(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.bytes(8), "little")

    def string(self, what: str) -> str:
        try:
            return self.bytes(self.u64()).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error.reason})") from None

    def name(self, what: str) -> str:
        length = self.u64()
        if not 1 <= length <= _MAX_NAME_BYTES:
            raise self.error(f"a {what} has a name of {length} bytes: out of range")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"the name of a {what} is not UTF-8 ({error.reason})") from None

    def value(self, key: str) -> object:
        code = self.u32()
        if code == _STRING:
            return self.string(key)
        if code == _ARRAY:
            return self._array(key)
        return self._numbers(key, code, 1)[0].item()

    def _array(self, key: str) -> Strings | np.ndarray:
        code, count = self.u32(), self.u64()
        if count > _MAX_ITEMS:
            raise self.error(f"{key} should have {count} items: out of range")
        if code == _ARRAY:
            raise UnsupportedError(f"{self.error(f'{key} is an array of arrays')}: not supported")
        return self._strings(count) if code == _STRING else self._numbers(key, code, count)

    def _strings(self, count: int) -> Strings:
        start = at = self.position
        for _ in range(count):
            if at + 8 > len(self._data):
                self._reach(at + 8)
            at += 8 + _U64(self._data, at)[0]
        self._reach(at)
        self.position = at
        return Strings(self._data[start:at], count)

    def _numbers(self, key: str, code: int, count: int) -> np.ndarray:
        dtype = _NUMBERS.get(code)
        if dtype is None:
            raise self.error(f"{key} is of type {code}, which GGUF does not have")
        data = np.frombuffer(self.bytes(count * dtype.itemsize), dtype)
        if code == _BOOL and (data.view(np.uint8) > 1).any():
            raise self.error(f"{key} is neither true nor false")
        return data

    def tensor(self) -> TensorInfo:
        name, n = self.name("tensor"), self.u32()
        if not 1 <= n <= _MAX_DIMS:
            raise self.error(f"tensor {name!r:.200} has {n} dimensions: out of range")
        dims = struct.unpack(f"<{n}Q", self.bytes(8 * n))
        return TensorInfo(name, dims, self.u32(), self.u64())
