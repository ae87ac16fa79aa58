"""Writing a store: append-only to a temporary file beside the target, synced, then renamed.

Until `finish` returns, the target is untouched; whatever goes wrong before, the temporary file is
removed (and one that a killed process left behind lacks its footer, so it does not open).
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from . import format as fmt
from ._native import crc32c
from .errors import StoreError
from .format import Footer, Kind, Layout, Meta, Section
from .spec import ModelSpec

_ADVICE = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "your quota is used up: free some space or choose another disk",
    errno.EFBIG: "the file would be larger than this system allows: choose another disk",
    errno.EROFS: "choose a target that can be written to",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.ENOENT: "make the directory first",
    errno.ENOTDIR: "choose a target inside a directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the device failed: check it, or choose another disk",
}


class StoreWriter:
    """Writes one store; use it in a `with` statement, where leaving without `finish` removes all.

    Bundles are written in the order of `format.bundle_order`, vocabulary tables around them. Raises
    StoreError, before any work where the target exists (without `force`) or cannot be made.
    """

    def __init__(self, path: str | os.PathLike, page_size: int = 4096, force: bool = False):
        fmt.check_page_size(page_size)
        self.path = Path(path)
        self.page_size = page_size
        self._force = force
        self._entries: list[tuple] = []
        self._layouts: dict[Layout, int] = {}
        self._end = 0
        self._open_bundle = False
        self._file = None
        self._temp: Path | None = None
        check_target(self.path, force)
        try:
            with _told(self.path):
                self._create()
            self._write(fmt.encode_header(page_size, crc32c))
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_) -> None:
        self.abort()

    @contextmanager
    def bundle(self, kind: Kind, layer: int, index: int, layout: Layout):
        """Append one bundle: `with writer.bundle(...) as bundle: bundle.write(...)`.

        The segments are written in order; all of them must be there at the end.
        """
        assert not self._open_bundle and self._file is not None
        self._open_bundle = True
        first, out = self._end // self.page_size, BundleWriter(self._write, layout)
        yield out
        out.close()
        self._pad()
        count = self._end // self.page_size - first
        layout_id = self._layouts.setdefault(layout, len(self._layouts))
        entry = (kind, layout_id, layer, index, count, first, layout.payload_bytes, out.crc32c, 0)
        self._entries.append(entry)
        self._open_bundle = False

    def finish(
        self,
        spec: ModelSpec,
        tokenizer_json: bytes,
        *,
        chat_template: str | None = None,
        generation: dict | None = None,
        tokenizer_config: dict | None = None,
        provenance: dict | None = None,
        recipe: dict | None = None,
    ) -> int:
        """Write what follows the bundles and give the store its name; return its size in bytes.

        Raises CorruptError where the bundles written are not those of `spec`, or a section is
        beyond the limits of the format: nothing is published that a reader would refuse.
        """
        assert not self._open_bundle and self._file is not None
        dicts = (generation or {}, tokenizer_config or {}, provenance or {}, recipe or {})
        meta = Meta(spec, tuple(self._layouts), chat_template, *dicts)
        entries = np.array(self._entries, fmt.ENTRY)
        fmt.check_directory(entries, meta, self.page_size, self._end)
        sections = [
            self._section(data)
            for data in (fmt.encode_meta(meta), tokenizer_json, entries.tobytes())
        ]
        size = self._end + self.page_size
        footer = fmt.encode_footer(Footer(size, len(entries), *sections), self.page_size, crc32c)
        fmt.decode_footer(footer, self.page_size, size, crc32c)
        self._sync()
        self._write(footer)
        self._sync()
        self._publish()
        return size

    def abort(self) -> None:
        """Remove what was written; nothing happens after `finish`.

        What the system refuses here is passed over: the error that led here says more.
        """
        file, temp, self._file, self._temp = self._file, self._temp, None, None
        if file is not None:
            with suppress(OSError):
                file.close()
        if temp is not None:
            with suppress(OSError):
                temp.unlink(missing_ok=True)

    def _create(self) -> None:
        """Make a hidden file beside the target; what a dead process of our id left is passed by."""
        for attempt in range(100):
            suffix = f".{attempt}" if attempt else ""
            temp = self.path.with_name(f".{self.path.name}.{os.getpid()}{suffix}.tmp")
            if not os.path.lexists(temp):
                self._temp = temp
                self._file = temp.open("xb", buffering=0)
                return
        raise StoreError(f"writing {self.path}: remove the old .tmp files beside it first")

    def _section(self, data: bytes) -> Section:
        section = Section(self._end, len(data), crc32c(data))
        self._write(data)
        self._pad()
        return section

    def _pad(self) -> None:
        self._write(bytes(-self._end % self.page_size))

    def _write(self, data) -> None:
        view = memoryview(data).cast("B")
        with _told(self.path):
            while view:
                count = self._file.write(view)
                view = view[count:]
                self._end += count

    def _sync(self) -> None:
        with _told(self.path):
            os.fsync(self._file.fileno())

    def _publish(self) -> None:
        """Give the finished file its name in one step; without `force` never over another file."""
        with _told(self.path):
            self._file.close()
            if self._force:
                os.replace(self._temp, self.path)
            else:
                _rename_new(self._temp, self.path)
            self._file = self._temp = None
            _sync_directory(self.path.parent)


class BundleWriter:
    """Takes the payload of one bundle, segment after segment; `crc32c` runs along."""

    def __init__(self, write, layout: Layout):
        self._write = write
        self._layout = layout
        self._done = 0
        self.crc32c = 0

    def begin(self, name: str) -> None:
        """Fill with zeros up to where the segment `name` starts."""
        gap = self._layout[name].offset - self._done
        if gap < 0:
            raise ValueError(f"segment {name} starts before what was written last")
        self.write(bytes(gap))

    def write(self, data) -> None:
        """Append contiguous bytes of the payload, gaps between segments included (see `begin`)."""
        view = memoryview(data).cast("B")
        if self._done + len(view) > self._layout.payload_bytes:
            raise ValueError(f"more than the bundle's {self._layout.payload_bytes} bytes")
        self.crc32c = crc32c(view, self.crc32c)
        self._write(view)
        self._done += len(view)

    def close(self) -> None:
        """Raises ValueError unless the whole payload was written."""
        if self._done != self._layout.payload_bytes:
            total = self._layout.payload_bytes
            raise ValueError(f"{self._done} of the bundle's {total} bytes were written")


def check_target(path: Path, force: bool) -> None:
    """Raise StoreError where a store could not be put at `path`; to be asked before any work."""
    with _told(path):
        _check_target(path, force)


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir():
        raise StoreError(f"writing {path}: it is a directory; give a file name such as m.edgemem")
    if os.path.lexists(path):
        if not force:
            raise StoreError(_exists(path))
        if not path.is_file():
            raise StoreError(f"writing {path}: it is no regular file; choose another name")
    elif not path.parent.is_dir():
        raise StoreError(f"writing {path}: there is no directory {path.parent}; make it first")


@contextmanager
def _told(path: Path):
    """Turn what the system refuses into a StoreError that says what to try."""
    try:
        yield
    except FileExistsError:
        raise StoreError(_exists(path)) from None
    except OSError as error:
        advice = _ADVICE.get(error.errno, "choose another target")
        reason = error.strerror or str(error)
        raise StoreError(f"writing {path}: {reason}; {advice}") from error


def _exists(path: Path) -> str:
    return f"writing {path}: it exists; choose another name, or --force (force=True) to replace it"


def _rename_new(temp: Path, path: Path) -> None:
    """Rename unless `path` exists; without hard links it is a check and then a plain rename."""
    try:
        os.link(temp, path)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(temp, path)
    else:
        temp.unlink()


def _sync_directory(directory: Path) -> None:
    """Make the new name durable; systems that cannot sync a directory do not need it."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
