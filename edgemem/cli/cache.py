"""Checkpoints that are run as they are: converted once into a cache folder, opened from there.

    NAME-DTYPE-WHERE-STATE.edgemem

is the store of the source NAME: WHERE is a hash of its path, STATE one of its files' names, sizes
and times of change, and of the converter's version. A name that fits is a store that fits; the
stores of other states are removed when the source is converted again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from .. import __version__
from ..budget import show_size
from ..errors import CheckpointError, EdgeMemError, StoreError
from ..format import MAGIC, MAJOR, MINOR
from ..store import Store
from .options import note
from .signals import handled, main_code

try:
    import fcntl
except ImportError:  # Windows, which has no such locks: each process converts, the last one stays
    fcntl = None

_GGUF_MAGIC = b"GGUF"
_SPLIT_NAME = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf")
_FOLDER_PATTERNS = ("*.json", "*.jinja", "*.safetensors")
_NAME_LETTERS = 40
"""Of the source's name in the store's; a file's name may have 255 bytes, a letter up to 4."""


def as_store(
    path: str | os.PathLike, cache_dir: str | os.PathLike | None = None, dtype: str | None = None,
    neurons: bool = False,
) -> Path:  # fmt: skip
    """The store of a model: of a checkpoint that of the cache, made if it is not there.

    A checkpoint is a folder with a config.json, or a file that starts as GGUF does; any other path
    is returned as it is, for the engine to open or to refuse. `cache_dir` is by default that of
    `default_folder`, `dtype` "keep", as in `converters.convert`, which says what `neurons` are.

    Making the store takes the time and the disk space of `edgemem convert`, none of this process's
    memory, and is told on stderr. Others that ask for the same store wait for it. Raises ValueError
    for a `dtype` or `neurons` with a store, StoreError for a folder that cannot be used,
    CheckpointError for a source that changes meanwhile, click's Exit for a conversion that failed
    and said why.
    """
    source = _Source(Path(path), dtype or "keep", neurons)
    if not source.files():
        given = "--neurons" if neurons else "--dtype" if dtype is not None else None
        if given is not None and _starts_with(source.path, MAGIC):
            raise ValueError(
                f"{given} is for a checkpoint; {path} is a store, whose number formats are fixed"
            )
        return source.path
    folder = default_folder() if cache_dir is None else Path(cache_dir)
    store = folder / source.store_name()
    if _is_whole(store):
        return store
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{source.prefix}.lock", source) as lock:
            store = folder / source.store_name()  # of what the source is now, after waiting
            if not _is_whole(store):
                _make(source, store, lock)
    except OSError as error:
        raise StoreError(
            f"making a store of {path} in {folder}: {error.strerror}; choose another folder with "
            "--cache-dir"
        ) from error
    return store


def default_folder() -> Path:
    """$EDGEMEM_CACHE, or `edgemem` in the folder where the system wants caches to be."""
    if os.environ.get("EDGEMEM_CACHE"):
        return Path(os.environ["EDGEMEM_CACHE"])
    if sys.platform == "darwin":
        base = "~/Library/Caches"
    elif sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        given = os.environ.get("XDG_CACHE_HOME", "")
        base = given if os.path.isabs(given) else "~/.cache"
    try:
        return Path(base).expanduser() / "edgemem"
    except RuntimeError as error:
        raise StoreError(f"choosing a cache folder: {error}; give one with --cache-dir") from None


def made_folder(folder: Path) -> Path:
    """A cache folder, made if it is not there. Raises StoreError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"making the cache folder {folder}: {error.strerror}; choose another with --cache-dir"
        ) from error
    return folder


@dataclass(frozen=True)
class _Source:
    """A path that may be a checkpoint's, and how its store is wanted."""

    path: Path
    dtype: str
    neurons: bool = False

    def files(self) -> list[Path]:
        """All files whose change changes the store; none where the path is no checkpoint's."""
        if os.path.isdir(self.path):
            is_checkpoint = os.path.exists(self.path / "config.json")
            patterns = _FOLDER_PATTERNS if is_checkpoint else ()
            return sorted(file for pattern in patterns for file in self.path.glob(pattern))
        return self._parts() if _starts_with(self.path, _GGUF_MAGIC) else []

    def _parts(self) -> list[Path]:
        """A GGUF file, or all those that one was split into; any of them may be given."""
        split = _SPLIT_NAME.fullmatch(self.path.name)
        if not split or not int(split[2]):
            return [self.path]
        numbers = range(1, int(split[2]) + 1)
        return [self.path.with_name(f"{split[1]}-{n:05}-of-{split[2]}.gguf") for n in numbers]

    @property
    def prefix(self) -> str:
        """What the names of all its stores start with."""
        if os.path.isdir(self.path):
            place = os.path.realpath(self.path)
            name = os.path.basename(place)
        else:
            first = self._parts()[0].name
            split = _SPLIT_NAME.fullmatch(first)
            name = split[1] if split else first.removesuffix(".gguf")
            place = os.path.join(os.path.realpath(self.path.parent), first)
        form = f"{self.dtype}-neurons" if self.neurons else self.dtype
        return f"{name[:_NAME_LETTERS]}-{form}-{_digest(place)}"

    def store_name(self) -> str:
        state = [(path.name, *_size_and_time(path)) for path in self.files()]
        return f"{self.prefix}-{_digest(state, __version__, MAJOR, MINOR)}.edgemem"


def _size_and_time(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:  # a link to nowhere: the converter says so if the file is needed
        return ()
    return status.st_size, status.st_mtime_ns


def _digest(*facts) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return False
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _is_whole(store: Path) -> bool:
    try:
        Store.open(store).close()
    except EdgeMemError:
        return False
    return True


@contextlib.contextmanager
def _alone(path: Path, source: _Source) -> Iterator[int]:
    """Hold a lock file, made for it and removed after; it ends with the last process that has it.

    Gives its descriptor, for the process that converts to hold as well.
    """
    fd = _lock(path, source)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(fd)


def _lock(path: Path, source: _Source) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait(fd, source)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was removed by who had it before


def _wait(fd: int, source: _Source) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(f"edgemem: waiting for another process that converts {source.path}")
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        pass  # not every file system can; stores appear whole all the same


def _make(source: _Source, store: Path, lock: int) -> None:
    """Convert under another name, which the store loses only if the source stayed as it was."""
    part = store.with_suffix(".part")
    try:
        old = [
            p for p in store.parent.iterdir() if p.name.lstrip(".").startswith(source.prefix + "-")
        ]
        if store in old:
            note(f"edgemem: {store} is damaged: converting {source.path} again")
        elif any(p.suffix == ".edgemem" for p in old):
            note(f"edgemem: {source.path} (or edgemem) has changed: converting it again")
        else:
            note(f"edgemem: converting {source.path} once, into {store.parent} (--cache-dir)")
        for path in old:
            path.unlink()
        _convert(source, part, lock)
        if source.store_name() != store.name:
            raise CheckpointError(
                f"reading {source.path}: it changed while it was converted, so nothing is kept; "
                "try again once it is complete"
            )
        os.replace(part, store)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    note(f"edgemem: the store is {store} ({show_size(store.stat().st_size)})")


def _convert(source: _Source, target: Path, lock: int) -> None:
    """Run `edgemem convert` in a process of its own: its memory counts for no budget of ours.

    It is in a session of its own too, so that Ctrl-C comes to this process alone. What would end
    this process is passed on, and the converter's last words and exit code are those of both.
    """
    command = [sys.executable, "-c", main_code(), "convert"]
    command += ["-o", target, "--dtype", source.dtype]
    command += [*(["--neurons"] if source.neurons else []), "--", source.path]
    arrived: list[int] = []
    process = None

    def pass_on(number: int, _frame) -> None:
        arrived.append(number)
        if process is not None:
            process.send_signal(number)

    with handled(pass_on, "SIGINT", "SIGTERM", "SIGHUP"):
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                pass_fds=() if fcntl is None else (lock,), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise EdgeMemError(
                f"converting {source.path}: starting {sys.executable}: {error.strerror}; try "
                "'edgemem convert', and give its store"
            ) from error
        for number in arrived:
            process.send_signal(number)
        code = process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        note(f"edgemem: converting {source.path}: ended by {name}; is there enough memory?")
        code = 128 - code
    if code:
        raise click.exceptions.Exit(code)
