"""Reading a store. FORMAT.md draws the file; `format` checks what it says.

Opening checks everything but the payloads: header, footer, sections, and that the directory lists
exactly the bundles, segments and shapes of the model. Payloads are checked as they are read.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import format as fmt
from ._native import crc32c
from .errors import CorruptError, FlashError, StoreError, UnsupportedError
from .format import NO_LAYER, Kind, Layout

_CHUNK_BYTES = 4 << 20
_AGAIN = "copy the store afresh, or convert the checkpoint again"


@dataclass(frozen=True)
class VerifyReport:
    """What `Store.verify` read, and what was wrong with it (nothing, where `faults` is empty)."""

    bundle_count: int
    payload_bytes: int
    file_bytes: int
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults


class Store:
    """An open store; close it, or use it in a `with` statement. Several threads may read at once.

    `entries` is the directory, a read-only array of `format.ENTRY`; a bundle's id is its position.
    `tokenizer_json` holds the bytes of the tokenizer's own file.
    """

    def __init__(self, path: Path, file, page_size: int, footer: fmt.Footer):
        self.path = path
        self.page_size = page_size
        self.file_bytes = footer.file_bytes
        self._file = file
        self._footer = footer
        self._lock = threading.Lock()
        meta = fmt.decode_meta(self._section("meta", footer.meta))
        self.tokenizer_json = self._section("tokenizer", footer.tokenizer)
        directory = self._section("directory", footer.directory)
        self.entries = np.frombuffer(directory, fmt.ENTRY)
        fmt.check_directory(self.entries, meta, page_size, footer.meta.offset)
        self.spec = meta.spec
        self.layouts = list(meta.layouts)
        self.chat_template = meta.chat_template
        self.generation = meta.generation
        self.tokenizer_config = meta.tokenizer_config
        self.provenance = meta.provenance
        self.recipe = meta.recipe
        self._runs = _runs(self.entries)

    @classmethod
    def open(cls, path: str | os.PathLike) -> Store:
        """Raises StoreError (missing, no store), CorruptError, UnsupportedError or FlashError."""
        path = Path(path)
        file = _open(path)
        try:
            size = os.fstat(file.fileno()).st_size
            page_size = fmt.decode_header(_read_at(file, 0, fmt.HEADER_BYTES), crc32c)
            if size % page_size:
                raise CorruptError(f"its {size} bytes are no whole number of pages: truncated")
            tail = _read_at(file, size - page_size, page_size)
            return cls(path, file, page_size, fmt.decode_footer(tail, page_size, size, crc32c))
        except BaseException as error:
            file.close()
            if isinstance(error, StoreError | UnsupportedError):
                advice = f"; {_AGAIN}" if isinstance(error, CorruptError) else ""
                raise type(error)(f"opening {path}: {error}{advice}") from None
            if isinstance(error, OSError):
                raise FlashError(f"opening {path}: {error.strerror}; check the device") from error
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def find(self, kind: Kind, layer: int = NO_LAYER) -> np.ndarray:
        """The ids of one layer's bundles of one kind, in order of `index`; may be empty."""
        first, stop = self._runs.get((int(kind), int(layer)), (0, 0))
        return np.arange(first, stop)

    def layout_of(self, bundle_id: int) -> Layout:
        return self.layouts[self.entries["layout"][bundle_id]]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text: those of the generation defaults, or else of the model's config."""
        named = self.generation.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        ids = frozenset(id for id in named if type(id) is int)
        return ids or frozenset(self.spec.eos_ids)

    def read(self, bundle_id: int, out, check: bool = True) -> int:
        """Read one bundle into `out`, a writable contiguous buffer; return the bytes read.

        `out` holds either the payload or the whole run of pages (whose tail is zeros). Raises
        ValueError where it holds neither, CorruptError where the bytes are not those that were
        written (only with `check`), FlashError where the device fails.
        """
        entry = self.entries[bundle_id]
        payload, run = int(entry["payload_bytes"]), int(entry["page_count"]) * self.page_size
        view = memoryview(out).cast("B")
        if len(view) not in (payload, run):
            raise ValueError(f"a buffer of {len(view)} bytes is neither {payload} nor {run} bytes")
        self._read_into(int(entry["page_first"]) * self.page_size, view, self.describe(bundle_id))
        if check and crc32c(view[:payload]) != entry["crc32c"]:
            raise CorruptError(self._fault(bundle_id))
        return len(view)

    def read_segment(self, bundle_id: int, segment: fmt.Segment) -> bytes:
        """The bytes of one segment, which no checksum is compared with. Raises CorruptError where
        the file ends early, FlashError where the device fails."""
        data = bytearray(segment.bytes)
        start = int(self.entries[bundle_id]["page_first"]) * self.page_size + segment.offset
        self._read_into(start, memoryview(data), self.describe(bundle_id))
        return bytes(data)

    def places(self, bundle_id: int) -> np.ndarray | None:
        """Which place each row of a bundle has among its rows, uint32 [n]; None: its own. Raises as
        `read_segment` and `check_places` do."""
        layout = self.layout_of(bundle_id)
        if "places" not in layout:
            return None
        words = np.frombuffer(self.read_segment(bundle_id, layout["places"]), "<u4")
        return self.check_places(bundle_id, words[: layout["places"].cols])

    def check_places(self, bundle_id: int, places: np.ndarray) -> np.ndarray:
        """`places` (uint32 [n]) of a bundle's rows; CorruptError where two rows share one."""
        if not np.array_equal(np.sort(places), np.arange(len(places))):
            what = f"the places of {self.describe(bundle_id)} of {self.path}"
            raise CorruptError(f"reading {what}: they are no order of its rows; {_AGAIN}")
        return places

    def verify(self, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every byte: payloads against their checksums, and padding, which must be zero.

        `progress(done_bytes, total_bytes)` is called as it goes. Faults are collected, not raised;
        FlashError is raised where the device fails.
        """
        faults = []
        if not self._zero(fmt.HEADER_BYTES, self.page_size):
            faults.append("the header page is not padded with zeros")
        scratch = memoryview(bytearray(_CHUNK_BYTES))
        for bundle_id in range(len(self.entries)):
            faults += self._verify_bundle(bundle_id, scratch)
            if progress:
                entry = self.entries[bundle_id]
                pages = int(entry["page_first"]) + int(entry["page_count"])
                progress(pages * self.page_size, self.file_bytes)
        footer = self._footer
        last = self.file_bytes - self.page_size
        ends = [s.offset + s.bytes for s in (footer.meta, footer.tokenizer, footer.directory)]
        stops = [footer.tokenizer.offset, footer.directory.offset, last]
        if not all(map(self._zero, [*ends, last + fmt.FOOTER_BYTES], [*stops, self.file_bytes])):
            faults.append("the pages after the bundles are not padded with zeros")
        if progress:
            progress(self.file_bytes, self.file_bytes)
        payload = int(self.entries["payload_bytes"].sum())
        return VerifyReport(len(self.entries), payload, self.file_bytes, tuple(faults))

    def _verify_bundle(self, bundle_id: int, scratch: memoryview) -> list[str]:
        entry, crc, done = self.entries[bundle_id], 0, 0
        start, payload = int(entry["page_first"]) * self.page_size, int(entry["payload_bytes"])
        while done < payload:
            part = scratch[: min(payload - done, len(scratch))]
            self._read_into(start + done, part, self.describe(bundle_id))
            crc, done = crc32c(part, crc), done + len(part)
        faults = [] if crc == entry["crc32c"] else [self._fault(bundle_id)]
        if not faults and entry["kind"] == Kind.NEURONS:
            faults += self._verify_rows(bundle_id)
        if not self._zero(start + payload, start + int(entry["page_count"]) * self.page_size):
            faults.append(f"{self.describe(bundle_id)} is not padded with zeros")
        return faults

    def _verify_rows(self, bundle_id: int) -> list[str]:
        """What a run goes by that reads rows one by one: where they lie, and their checksums."""
        layout, what = self.layout_of(bundle_id), self.describe(bundle_id)
        rows = layout["neurons"]
        checksums = np.frombuffer(self.read_segment(bundle_id, layout["checksums"]), "<u4")
        try:
            places = self.places(bundle_id)
        except CorruptError as error:
            return [str(error)]
        start = int(self.entries[bundle_id]["page_first"]) * self.page_size + rows.offset
        row = memoryview(bytearray(rows.bytes // rows.rows))
        for id, place in enumerate(range(rows.rows) if places is None else places.tolist()):
            self._read_into(start + place * len(row), row, what)
            if crc32c(row) != checksums[id]:
                return [f"neuron {id} of {self._fault(bundle_id)}"]
        return []

    def _zero(self, start: int, stop: int) -> bool:
        """Whether the bytes in [start, stop), at most one page, are all zero."""
        padding = bytearray(stop - start)
        self._read_into(start, memoryview(padding), "padding")
        return not any(padding)

    def _read_into(self, offset: int, view: memoryview, what: str) -> None:
        try:
            with self._lock:
                self._file.seek(offset)
                done = 0
                while done < len(view):
                    count = self._file.readinto(view[done:])
                    if not count:
                        raise CorruptError(f"{self.path} ends within {what}; {_AGAIN}")
                    done += count
        except OSError as error:
            raise FlashError(
                f"reading {what} of {self.path}: {error.strerror}; check the device"
            ) from error

    def _section(self, what: str, section: fmt.Section) -> bytes:
        data = _read_at(self._file, section.offset, section.bytes)
        if len(data) != section.bytes or crc32c(data) != section.crc32c:
            raise CorruptError(f"the {what} section does not match its checksum")
        return data

    def describe(self, bundle_id: int) -> str:
        """A bundle's kind, index and layer, for messages."""
        entry = self.entries[bundle_id]
        kind = Kind(int(entry["kind"])).name.lower()
        layer = "" if entry["layer"] == NO_LAYER else f" of layer {entry['layer']}"
        return f"{kind} bundle {entry['index']}{layer}"

    def _fault(self, bundle_id: int) -> str:
        return f"{self.describe(bundle_id)} of {self.path} does not match its checksum; {_AGAIN}"


def read_error(what: str, error: int) -> CorruptError | FlashError:
    """The exception for a read of `what` that failed: an errno, or 0 for a wrong checksum."""
    if error == 0:
        return CorruptError(f"reading {what}: its checksum is wrong; {_AGAIN}")
    if error == errno.ENODATA:
        return CorruptError(f"reading {what}: the file ends before it; {_AGAIN}")
    return FlashError(f"reading {what}: {os.strerror(error)}; check the device")


def open_direct(path) -> tuple[int, bool]:
    """A descriptor that bypasses the page cache where a read proves that it works, and whether."""
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            fd = os.open(path, os.O_RDONLY | flag | os.O_CLOEXEC)
        except OSError:
            fd = -1
        if fd >= 0:
            try:
                if os.preadv(fd, [mmap.mmap(-1, 4096)], 0) == 4096:
                    return fd, True
            except OSError:
                pass
            os.close(fd)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    except OSError as error:
        raise FlashError(f"opening {path}: {error.strerror}; check the device") from error


def _runs(entries: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """(kind, layer) → (first id, one past the last); a checked directory has one run of each."""
    keys = entries["kind"].astype(np.uint64) << np.uint64(32) | entries["layer"]
    firsts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    stops = np.r_[firsts[1:], len(entries)]
    kinds, layers = entries["kind"][firsts].tolist(), entries["layer"][firsts].tolist()
    runs = zip(firsts.tolist(), stops.tolist(), strict=True)
    return dict(zip(zip(kinds, layers, strict=True), runs, strict=True))


def _open(path: Path):
    """An unbuffered regular file; opening a pipe would wait for ever."""
    if path == Path():
        raise StoreError(
            "opening a store: its path is empty or '.', no file; give the path of an .edgemem file"
        )
    try:
        if path.exists() and not path.is_file():
            raise StoreError(f"opening {path}: it is not a file; give the path of an .edgemem file")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise StoreError(
            f"opening {path}: there is no such file; make one with 'edgemem convert'"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"opening {path}: {reason}; check its name and permissions") from error


def _read_at(file, offset: int, count: int) -> bytes:
    """Up to `count` bytes (fewer only at the end of the file)."""
    file.seek(offset)
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
