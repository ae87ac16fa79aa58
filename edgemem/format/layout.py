"""Bundles and what lies inside them: kinds, segments, and the layout classes that bundles share."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from ..dtypes import BLOCK, BY_NAME, LANES, U32, DType, matrix_bytes, round_up
from ..errors import CorruptError, UnsupportedError
from ..spec import MAX_DIM

NO_LAYER = 0xFFFFFFFF
"""The `layer` of bundles that belong to no layer: embedding rows and head rows."""

SEGMENT_ALIGN = 64
"""Segments start at multiples of a cache line, so that kernels may load whole vectors of them."""

_MAX_BUNDLE_BYTES = 1 << 40
_MAX_SEGMENTS = 64
_SEGMENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_FORMATS = BY_NAME | {U32.name: U32}
_SEGMENT_FIELDS = ("name", "dtype", "lanes", "rows", "cols")


class Kind(IntEnum):
    """What a bundle is; `bundle_order` says in which order they lie in the file."""

    EMBED = 0
    DENSE = 1
    FFN = 2
    EXPERT = 3
    SHARED = 4
    HEAD = 5
    NEURONS = 6
    PREDICTOR = 7


STREAMABLE = (Kind.EMBED, Kind.FFN, Kind.EXPERT, Kind.NEURONS)
"""Kinds that stream where not everything fits: a step needs some of them, or one after another."""


@dataclass(frozen=True)
class Segment:
    """One matrix (or vector: lanes 1, rows 1) inside a bundle; `offset` counts from its start."""

    name: str
    dtype: DType
    lanes: int
    rows: int
    cols: int
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes


@dataclass(frozen=True)
class Layout:
    """The segments of every bundle of one class, in the order in which kernels consume them."""

    segments: tuple[Segment, ...]

    @classmethod
    def build(cls, shapes: Iterable[tuple[str, DType, int, int, int]]) -> "Layout":
        """Place segments, given as (name, dtype, lanes, rows, cols), one after another."""
        segments, end = [], 0
        for name, dtype, lanes, rows, cols in shapes:
            offset, size = round_up(end, SEGMENT_ALIGN), matrix_bytes(dtype, rows, cols, lanes)
            segments.append(Segment(name, dtype, lanes, rows, cols, offset, size))
            end = offset + size
        return cls(tuple(segments))

    @property
    def payload_bytes(self) -> int:
        return self.segments[-1].end

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}

    def __getitem__(self, name: str) -> Segment:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def to_json(self) -> list[dict]:
        return [
            {field: getattr(s, field) for field in _SEGMENT_FIELDS} | {"dtype": s.dtype.name}
            for s in self.segments
        ]

    @classmethod
    def from_json(cls, data) -> "Layout":
        """Raises CorruptError, or UnsupportedError for a number format that is not known here."""
        if not isinstance(data, list) or not 1 <= len(data) <= _MAX_SEGMENTS:
            raise CorruptError("a layout is not a list of 1 to 64 segments")
        shapes = [_segment_shape(item) for item in data]
        if len({shape[0] for shape in shapes}) != len(shapes):
            raise CorruptError("a layout names a segment twice")
        layout = cls.build(shapes)
        if layout.payload_bytes > _MAX_BUNDLE_BYTES:
            raise CorruptError(f"a layout of {layout.payload_bytes} bytes is out of range")
        return layout


def _segment_shape(item) -> tuple[str, DType, int, int, int]:
    if not isinstance(item, dict) or set(item) != set(_SEGMENT_FIELDS):
        raise CorruptError(f"a layout's segment has other fields than {', '.join(_SEGMENT_FIELDS)}")
    name, dtype, lanes, rows, cols = (item[field] for field in _SEGMENT_FIELDS)
    if not isinstance(name, str) or not _SEGMENT_NAME.fullmatch(name):
        raise CorruptError(f"a layout's segment has the name {name!r:.60}")
    if not isinstance(dtype, str):
        raise CorruptError(f"segment {name} has no number format")
    if dtype not in _FORMATS:
        raise UnsupportedError(
            f"segment {name} is in format {dtype!r:.40}; this version reads {', '.join(BY_NAME)}"
        )
    if lanes not in (1, LANES) or not all(type(n) is int for n in (lanes, rows, cols)):
        raise CorruptError(f"segment {name} has lanes {lanes!r:.40}")
    if not (1 <= rows <= MAX_DIM and 1 <= cols <= MAX_DIM):
        raise CorruptError(f"segment {name} has the shape {rows!r:.40} × {cols!r:.40}")
    if _FORMATS[dtype].block > BLOCK and cols % _FORMATS[dtype].block:
        raise CorruptError(f"segment {name} has {cols} columns, no whole blocks of {dtype}")
    return name, _FORMATS[dtype], lanes, rows, cols
