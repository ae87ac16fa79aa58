"""One safetensors file: its header checked in full, its tensors read row by row.

The format (https://github.com/huggingface/safetensors): u64 header length, JSON header, then the
bytes of the tensors back to back. As in its reference implementation, the header is at most 100 MB
and tensors tile the rest of the file without a gap or an overlap.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemem.dtypes import BF16, F16, F32, DType
from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import parse_json

from ..quantize import BITS

_MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 8
_FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `offset` and `bytes` are within its file, already checked against it."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    file: "TensorFile"

    @property
    def dtype(self) -> DType:
        """Raises UnsupportedError for what is not f32, f16 or bf16."""
        if self.type_name not in _FLOATS:
            raise UnsupportedError(
                f"reading {self.file.path}: tensor {self.name} is of type {self.type_name}; "
                f"supported are {', '.join(_FLOATS)}: save the checkpoint in one of these"
            )
        return _FLOATS[self.type_name]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, with all axes but the last taken as one."""
        return self.shape[-1] * BITS[self.dtype].itemsize

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Raw bits [count, cols] of rows of the tensor, its leading axes taken as one.

        Raises CheckpointError where the file ends early or cannot be read.
        """
        bits, cols = BITS[self.dtype], self.shape[-1]
        row_bytes = cols * bits.itemsize
        assert first >= 0 and (first + count) * row_bytes <= self.bytes
        data = self.file.read(self.offset + first * row_bytes, count * row_bytes)
        return np.frombuffer(data, bits).reshape(count, cols)


class TensorFile:
    """An open safetensors file; `tensors` by name. Several threads may read at once."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = _open(path)
        try:
            self._size = os.fstat(self._fd).st_size
            self.tensors = self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def bytes(self) -> int:
        """The file's size."""
        return self._size

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes."""
        parts, end = [], offset + count
        try:
            while offset < end:
                part = os.pread(self._fd, end - offset, offset)
                if not part:
                    raise self._error("it ends early: it was truncated while being read")
                parts.append(part)
                offset += len(part)
        except OSError as error:
            raise self._error(f"{error.strerror}; check the device") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _parse(self) -> dict[str, Tensor]:
        if self._size < 8:
            raise self._error("it is too short for a safetensors file")
        length = int.from_bytes(self.read(0, 8), "little")
        if length > min(_MAX_HEADER_BYTES, self._size - 8):
            raise self._error(
                f"its header should have {length} bytes: truncated, or no safetensors file"
            )
        try:
            header = parse_json(self.read(8, length), unique_keys=True)
        except ValueError as error:
            raise self._error(f"its header is wrong: {error}") from None
        if not isinstance(header, dict):
            raise self._error("its header is wrong: it is not a JSON object")
        header.pop("__metadata__", None)
        tensors = [self._tensor(name, item, 8 + length) for name, item in header.items()]
        self._check_tiling(tensors, 8 + length)
        return {tensor.name: tensor for tensor in tensors}

    def _tensor(self, name: str, item, data_start: int) -> Tensor:
        """One entry of the header; where it lies is checked for all of them together."""
        fields = ("dtype", "shape", "data_offsets")
        if not isinstance(item, dict) or set(item) != set(fields):
            raise self._error(f"tensor {name!r:.200} has other fields than {', '.join(fields)}")
        type_name, shape, offsets = (item[field] for field in fields)
        if not isinstance(type_name, str):
            raise self._error(f"tensor {name!r:.200} has no type")
        if not _are_sizes(shape) or len(shape) > _MAX_RANK:
            raise self._error(f"tensor {name!r:.200} has the shape {shape!r:.80}")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(f"tensor {name!r:.200} has the offsets {offsets!r:.80}")
        start, size = offsets[0], offsets[1] - offsets[0]
        known = _ITEM_BYTES.get(type_name)
        if known is not None and math.prod(shape) * known != size:
            raise self._error(f"tensor {name!r:.200} has {size} bytes, which its shape contradicts")
        return Tensor(name, type_name, tuple(shape), data_start + start, size, self)

    def _check_tiling(self, tensors: list[Tensor], data_start: int) -> None:
        end = data_start
        for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
            if tensor.offset != end:
                raise self._error(f"tensor {tensor.name!r:.200} does not follow the one before it")
            end += tensor.bytes
        if end != self._size:
            raise self._error(
                f"its tensors end at byte {end}, the file has {self._size}: fetch it again"
            )

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"reading {self.path}: {what}")


def _are_sizes(values) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _open(path: Path) -> int:
    """Only a regular file is opened (links to one are fine): opening a pipe would wait for ever."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"reading {path}: it is not a file")
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise CheckpointError(f"reading {path}: there is no such file; fetch it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"reading {path}: {reason}; check its permissions") from error
