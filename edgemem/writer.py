"""Writing a store: append-only to a file without a name, synced, then given its name.

Until `finish` publishes, the target is untouched, and whatever goes wrong before, nothing is left.
Nor does a killed process leave anything where the system has files without a name (Linux has, on
most file systems), except in two instants: in the first, whether it has them is tried with an empty
file; in the second, `force` replaces a file by one that is whole and synced.

Then, and elsewhere all the time, the file has a hidden name beside the target, `.NAME.PID.N.tmp`,
and a killed process leaves it. The footer, without which a store does not open, is written last,
once all else is synced: what is left does not open, or is whole. The next writer for the same
target removes it, if the process is gone and nobody holds the lock that a writer has on its file.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import format as fmt
from ._native import crc32c
from .errors import StoreError
from .format import Footer, Kind, Layout, Meta, Section
from .spec import ModelSpec

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None

_ADVICE = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "choose another disk, or raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a target that can be written to",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.ENOENT: "choose a directory that takes files",
    errno.ENOTDIR: "choose a target inside a directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the device, or choose another disk",
}
_NUMBERS = itertools.count()
"""So that the threads of one process never choose the same hidden name."""


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
                _remove_leftovers(self.path)
                self._create()
                if force and hasattr(os, "fchmod"):  # what is replaced keeps who may read it
                    with suppress(FileNotFoundError):
                        os.fchmod(self._file.fileno(), stat.S_IMODE(self.path.stat().st_mode))
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
        judge: Callable[[Path], dict] | None = None,
    ) -> int:
        """Write what follows the bundles and give the store its name; return its size in bytes.

        `judge(path)`, where it is given, may open the store before others can: what it returns
        takes the place of `recipe`. Raises CorruptError where the bundles written are not those of
        `spec`, or a section is beyond the limits of the format: nothing is published that a reader
        would refuse.
        """
        assert not self._open_bundle and self._file is not None
        dicts = (generation or {}, tokenizer_config or {}, provenance or {}, recipe or {})
        meta = Meta(spec, tuple(self._layouts), chat_template, *dicts)
        bundles_end, size = self._end, self._seal(meta, tokenizer_json)
        if judge is not None:
            recipe = judge(self._temp or Path(f"/proc/self/fd/{self._file.fileno()}"))
            with _told(self.path):
                self._file.seek(bundles_end)
                self._file.truncate(bundles_end)
            self._end = bundles_end
            size = self._seal(replace(meta, recipe=recipe), tokenizer_json)
        self._publish()
        return size

    def _seal(self, meta: Meta, tokenizer_json: bytes) -> int:
        """What follows the bundles; the size of all."""
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
        """Open a file without a name in the target's directory, or one with a hidden name."""
        self._file = _open_unnamed(self.path)
        while self._file is None:
            self._temp = _hidden_name(self.path)
            file = self._temp.open("xb", buffering=0)
            _lock(file.fileno())
            if os.path.lexists(self._temp):
                self._file = file
            else:  # taken for a leftover before it was locked
                file.close()

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
            if self._temp is None:
                self._name()
            if self._temp is not None:
                if fcntl is None:  # closing ends the lock, and Windows renames closed files only
                    self._file.close()
                (os.replace if self._force else _rename_new)(self._temp, self.path)
            self._temp = None
            self._file.close()
            self._file = None
            _sync_directory(self.path.parent)

    def _name(self) -> None:
        """Give a file without a name that of the target, or a hidden one to replace it with."""
        try:
            _link(self._file.fileno(), self.path)
        except FileExistsError:
            if not self._force:
                raise
            self._temp = _hidden_name(self.path)
            _link(self._file.fileno(), self._temp)


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


def _hidden_name(path: Path) -> Path:
    """A name beside the target that nothing has; what a dead process of our id left is passed."""
    names = (path.with_name(f".{path.name}.{os.getpid()}.{n}.tmp") for n in _NUMBERS)
    return next(name for name in names if not os.path.lexists(name))


def _open_unnamed(path: Path):
    """A file without a name beside `path`, None where it could not be given one later.

    That is tried with an empty file, which cannot be used after: it had a name and lost it.
    """
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        trial, name = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY), _hidden_name(path)
    except OSError:
        return None
    try:
        _link(trial, name)
        fd = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:
        return None
    finally:
        os.close(trial)
        with suppress(OSError):
            name.unlink(missing_ok=True)
    _lock(fd)
    return open(fd, "wb", buffering=0)


def _link(fd: int, path: Path) -> None:
    """Give an open file a name that nothing has; `src_dir_fd` makes Python follow /proc's link."""
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def _lock(fd: int) -> None:
    """Show that the file is in use, for as long as it is open; not every file system can."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)


def _remove_leftovers(path: Path) -> None:
    """Remove hidden files of writers for this target that are gone, where that is certain."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([1-9]\d{{0,9}})(\.\d+)?\.tmp")
    with suppress(OSError), os.scandir(path.parent) as found:
        for entry in found:
            match = pattern.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False) and not _alive(int(match[1])):
                _unlink_unlocked(entry.path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it belongs to somebody else
    return True


def _unlink_unlocked(path: str) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(fd)


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
