"""Trace files: what every step demanded of the streamed layers, one line of JSON for each step.

The first line describes the model and the cache:

    {"edgemem_trace": 2, "model": "qwen3_moe", "policy": "next-use", "n_layers": 50,
     "layer_of": [1, 1, …], "class_of": [0, 0, …], "slots": [614], "read_ahead": [0],
     "row_layers": [], "row_counts": [], "room": []}

`layer_of` and `class_of` give the layer and the layout class of each streamed bundle, numbered as
policies number them: layers are turns, of which the first is the embedding's and the last the
head's. `slots` is the size of the cache for each class; `read_ahead` are the classes of which the
run read bundles before they were demanded. Of bundles that come apart each has a set of rows:
`row_layers` are the sets' layers, `row_counts` how many rows each has, and `room` how many of them
may be in memory. Every other line is a step:

    {"phase": "decode", "tokens": 1, "layers": [1, 2, …], "ids": [[3, 17], [140, 201], …],
     "hits": [1, 2, …], …}

with one item for each streamed layer, in the order in which the step came to them: the bundles that
it demanded, ascending, and the counters that the run kept (COUNTERS): how many were there already,
the bytes read because they were not, the time that products waited, and bytes read ahead that came
to use or were evicted before. `uses`, where a step has several tokens, says how many of them took
each bundle. `resized`, where the cache has other slots than in the step before, lists what they
became in turn, before this step began; `withheld_bytes` is what the slots were denied then because
the system was short of memory (absent for 0). What turns took of sets of rows is in

    "rows": {"sets": [0, 1, …], "ids": ["eAFjZ…", …], "hits": [97, …], "bytes": …, "stall_us": …}

where `ids` are as `pack` writes them; a `resized` in there, as long as that of the slots, lists
what `room` became. A step that was interrupted or failed has no line, though it may have changed
the cache. A run that is killed loses at most its last line. Traces of version 1 know of no rows.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .errors import EdgeMemError, StoreError

VERSION = 2
_MAGIC = b'{"edgemem_trace":'
COUNTERS = ("hits", "bytes", "stall_us", "prefetch_useful_bytes", "prefetch_wasted_bytes")
_FAR = 255


@dataclass(frozen=True)
class TraceHeader:
    """The first line of a trace file; see the module's own text."""

    model: str
    policy: str
    n_layers: int
    layer_of: tuple[int, ...]
    class_of: tuple[int, ...]
    slots: tuple[int, ...]
    read_ahead: tuple[int, ...] = ()
    row_layers: tuple[int, ...] = ()
    row_counts: tuple[int, ...] = ()
    room: tuple[int, ...] = ()


class TraceWriter:
    """Writes a trace file: `demand` for each layer of a step and `rows` for each turn of a set,
    then `step`; close it at the end.

    An older trace is replaced, no other file. Raises EdgeMemError where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, header: TraceHeader):
        self._path = path
        try:
            self._check_target(Path(path))
            # Unbuffered: a line is one call, which no interrupt leaves half done.
            self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._error(error) from error
        self._lists: dict[str, list] = {}
        self._rows: dict[str, list] = {}
        self._resized: list[tuple[int, ...]] = []
        self._room: list[tuple[int, ...]] = []
        self._write({"edgemem_trace": VERSION, **asdict(header)})

    def demand(
        self, layer: int, ids: Sequence[int], uses: Sequence[int] | None = None, **counters: int
    ) -> None:
        """One layer of the present step; a step gives each layer the same counters."""
        uses = [1] * len(ids) if uses is None else _ints(uses)
        _append(self._lists, {"layers": layer, "ids": _ints(ids), "uses": uses}, counters)

    def rows(self, number: int, ids: np.ndarray, **counters: int) -> None:
        """One turn of a set of rows, which took `ids`, ascending; counters as for `demand`."""
        _append(self._rows, {"sets": number, "ids": pack(ids)}, counters)

    def resize(self, slots: tuple[int, ...], room: tuple[int, ...] = ()) -> None:
        """There are so many slots of each class, and rows of each set, from the next step on."""
        self._resized.append(slots)
        self._room.append(room)

    def step(self, phase: str, tokens: int, withheld_bytes: int = 0) -> None:
        """End the present step and write it."""
        lists, self._lists = self._lists, {}
        rows, self._rows = self._rows, {}
        if tokens == 1:
            lists.pop("uses", None)
        line = {"phase": phase, "tokens": tokens}
        if self._resized:
            line["resized"], self._resized = self._resized, []
            room, self._room = self._room, []
            rows |= {"resized": room} if any(room) else {}
        if withheld_bytes:
            line["withheld_bytes"] = withheld_bytes
        if rows:
            lists["rows"] = rows
        self._write(line | lists)

    def drop(self) -> None:
        """Forget what the present step has demanded so far."""
        self._lists, self._rows = {}, {}

    def close(self) -> None:
        """End the trace, at the last whole step."""
        self._file.close()

    def _check_target(self, path: Path) -> None:
        if not path.is_file():  # or a device, or a pipe
            return
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
        if start and start != _MAGIC:
            raise EdgeMemError(
                f"recording a trace in {path}: it holds something else than a trace, which is not "
                "replaced; choose another file"
            )

    def _write(self, value: dict) -> None:
        line = json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"
        try:
            written = self._file.write(line)
            if written < len(line):
                self._file.seek(-written, os.SEEK_CUR)
                self._file.truncate()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> EdgeMemError:
        return EdgeMemError(f"recording a trace in {self._path}: {error.strerror or error}")


def _append(lists: dict[str, list], values: dict, counters: dict[str, int]) -> None:
    unknown = set(counters) - set(COUNTERS)
    if unknown:
        raise ValueError(f"{min(unknown)} is none of {', '.join(COUNTERS)}")
    for name, value in (values | counters).items():
        lists.setdefault(name, []).append(value)


def pack(ids: np.ndarray) -> str:
    """Ascending ids as text: a byte for each, which says how many ids are left out before it; for
    every 255 of them a byte of 255 comes first. What zlib makes of that, in base64."""
    left_out = np.diff(np.asarray(ids, np.int64), prepend=-1) - 1
    ends = np.cumsum(left_out // _FAR + 1)
    packed = np.full(ends[-1] if len(ends) else 0, _FAR, np.uint8)
    packed[ends - 1] = left_out % _FAR
    return base64.b64encode(zlib.compress(packed.tobytes(), 1)).decode("ascii")


def unpack(text: str, count: int) -> np.ndarray:
    """What `pack` was given, int64, all below `count`. Raises ValueError or TypeError for others,
    and takes no more memory for them."""
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(base64.b64decode(text, validate=True), count + 1)
    except zlib.error as error:
        raise ValueError(f"packed ids are damaged: {error}") from None
    packed = np.frombuffer(found, np.uint8)
    ends = packed < _FAR
    ids = np.cumsum(packed + ends.astype(np.int64))[ends] - 1
    whole = inflate.eof and (not len(packed) or ends[-1])
    if not whole or (len(ids) and ids[-1] >= count):
        raise ValueError(f"packed ids are cut off, or beyond {count}")
    return ids


def _ints(values: Sequence[int]) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def read(path: str | os.PathLike) -> tuple[TraceHeader, Iterator[dict]]:
    """The header, and the steps one after another as dicts of what the lines say.

    Raises StoreError where the file is no trace; a last line that was cut off is left out.
    """
    lines = _lines(path)
    first = next(lines, None)
    version = first.pop("edgemem_trace", None) if isinstance(first, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"reading {path}: it is a trace of version {version}, and versions up to {VERSION} are "
            "known here; update edgemem, or record another with --trace FILE"
        )
    if version not in range(1, VERSION + 1):
        raise StoreError(f"reading {path}: it is no trace; record one with --trace FILE")
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in first.items()}
        header = TraceHeader(**values)
    except TypeError as error:
        raise StoreError(f"reading {path}: its first line is wrong: {error}") from None
    return header, lines


def popularity(path: str | os.PathLike, layer_of: Sequence[int]) -> np.ndarray:
    """How many tokens of a trace took each bundle, float32 [n]: a profile of what it recorded.

    Raises StoreError unless the trace is of a model whose streamed bundles lie in `layer_of`.
    """
    header, steps = read(path)
    if header.layer_of != tuple(layer_of):
        raise StoreError(
            f"reading the profile {path}: other bundles streamed when it was recorded; record one "
            "of this model, in a similar budget"
        )
    counts = np.zeros(len(header.layer_of), np.float32)
    for step in steps:
        try:
            ones = [1] * len(step["ids"])
            for ids, uses in zip(step["ids"], step.get("uses", ones), strict=True):
                np.add.at(counts, np.asarray(ids, np.uint32), uses)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(f"reading the profile {path}: a step is wrong: {error}") from None
    return counts


def _lines(path: str | os.PathLike) -> Iterator[dict]:
    try:
        with Path(path).open(encoding="ascii") as file:
            for line in file:
                if not line.endswith("\n"):
                    return
                yield json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"reading {path}: it is no trace: a line is no JSON ({error}); record one with "
            "--trace FILE"
        ) from None
    except OSError as error:
        raise StoreError(f"reading {path}: {error.strerror}") from error
