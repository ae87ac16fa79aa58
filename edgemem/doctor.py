"""What a device gives: flash by size, depth and engine, memory, and multiply-adds; measured once.

Flash is read in random order, by the engines that also read streamed bundles, either past the page
cache (direct) or through it after it was told to forget the file (buffered). All figures are of the
same places, which were read once before: what streams is read again and again, and what lies below
a virtual machine's disk keeps that near. What was measured lies in the cache folder, in a file
whose name says on which machine and file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, time

import numpy as np

from ._native import Slab, check, ffi, lib, pointer
from .benchmark import cpu_name
from .budget import MIB, auto_bytes, fast_cpus, show_size
from .dtypes import MULTIPLIED
from .errors import EdgeMemError, FlashError, UnsupportedError
from .format import parse_json
from .kernels import Core
from .store import open_direct

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
DEPTHS = (1, 4, 16, 64, 128)
ENGINES = ("io_uring", "threads")
ROUNDS = 3
"""Each figure is a median of so many, taken apart in time."""
READ_SECONDS, MEMORY_SECONDS, COMPUTE_SECONDS = 0.04, 0.4, 0.05
"""How long a figure of each kind is measured in a round."""
FILE_BYTES, LEAST_FILE_BYTES = 256 * MIB, 16 * MIB
"""So much is read, of a larger file at places all over it, and written where there is none."""
DISK_SHARE = 4
"""A file that is written for the purpose takes at most this part of what is free."""
MEMORY_BYTES = 1 << 30
BUFFER_BYTES = 256 * MIB
"""All that is measured is read into it in turn, so that processors' caches have little of what is
overwritten: into 16 MiB that they had, a virtual disk read 1.4 times as fast as into slots
(bench/LOG.md)."""
KNEE = 0.9
"""Reads are large and deep enough that give this share of the best rate."""
_MOUNTS, _IN_MEMORY = Path("/proc/self/mountinfo"), ("tmpfs", "ramfs")
_YEAR_3000, _MOST = 32_503_680_000, 1 << 40
FORMAT = 3
"""Of the file in the cache folder; those of another are not read."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reading:
    """Reads of `bytes` each, `depth` in flight by `engine`, past the page cache if `direct`."""

    engine: str
    direct: bool
    bytes: int
    depth: int
    bytes_per_second: float


@dataclass(frozen=True)
class Device:
    """What was measured, `measured_at` seconds after 1970, by `threads` threads.

    `multiply_adds` are those a second of each number format, without memory.
    """

    place: str
    cpu: str
    threads: int
    measured_at: float
    flash: tuple[Reading, ...]
    dram_bytes_per_second: float
    multiply_adds: dict[str, float]

    def chosen(self) -> list[Reading]:
        """The readings that are like the runtime's own: direct where that works, by io_uring where
        that does."""
        direct = any(r.direct for r in self.flash)
        names = {r.engine for r in self.flash if r.direct == direct}
        engine = next(name for name in ENGINES if name in names)
        return [r for r in self.flash if r.direct == direct and r.engine == engine]

    def flash_rate(self, size: int, depth: float) -> float:
        """Bytes per second of reads of `size` bytes, `depth` in flight: between what was measured,
        straight lines over logarithms; beyond it, what is nearest."""
        found = {(r.bytes, r.depth): r.bytes_per_second for r in self.chosen()}
        sizes = sorted({s for s, _ in found})
        at_depth = []
        for each in sizes:
            depths = sorted(d for s, d in found if s == each)
            rates = np.log([found[each, d] for d in depths])
            at_depth.append(np.interp(np.log(depth), np.log(depths), rates))
        return float(np.exp(np.interp(np.log(size), np.log(sizes), at_depth)))

    def paced(self, dram: float, flash: float) -> Device:
        """The same device, had memory been read at `dram` bytes per second, and flash `flash` times
        as fast."""
        readings = (replace(r, bytes_per_second=flash * r.bytes_per_second) for r in self.flash)
        return replace(self, dram_bytes_per_second=dram, flash=tuple(readings))

    def knee(self) -> Reading:
        """The reading with the fewest bytes in flight that has about the best rate."""
        readings = self.chosen()
        best = max(r.bytes_per_second for r in readings)
        enough = [r for r in readings if r.bytes_per_second >= KNEE * best]
        return min(enough, key=lambda r: (r.bytes * r.depth, r.depth))


def examine(
    place: str | os.PathLike, folder: str | os.PathLike, again: bool = False,
    progress: Progress | None = None,
) -> Device:  # fmt: skip
    """The figures of the device that `place` lies on: those in `folder`, or measured and put there.

    Measuring takes about 25 s and 1.25 GiB of memory. A file is read as it is, if it is large
    enough, and leaves the page cache; in a folder a file of up to 256 MiB is written, which has no
    name and ends with this process.
    `progress(done, total)` is called between measurements. Raises FlashError where that cannot be.
    """
    path = _file(place, folder)
    if not Path(place).is_dir():
        _file_bytes(Path(place))  # where nothing can be read, nothing is known
    found = None if again else known(place, folder)
    if found is None:
        _check_writable(path.parent)
        found = measure(place, progress)
        _keep(found, path)
    return found


def known(place: str | os.PathLike, folder: str | os.PathLike) -> Device | None:
    """The figures in `folder` of the device that `place` lies on; None where there are none."""
    try:
        said = parse_json(_file(place, folder).read_bytes())
        flash = tuple(Reading(**reading) for reading in said.pop("flash"))
        device = Device(**said, flash=flash)
        return device if _is_sound(device) else None
    except (EdgeMemError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def lies_in_memory(place: str | os.PathLike) -> bool:
    """Whether a file system keeps what is at `place` in memory, as far as Linux tells: then what is
    measured there is no flash."""
    number = os.stat(place).st_dev
    mounted = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return False
    parts = (line.partition(" - ") for line in lines)  # see proc_pid_mountinfo(5)
    found = [said.split()[0] for at, _, said in parts if at.split()[2] == mounted]
    return any(name in _IN_MEMORY for name in found)


def measure(place: str | os.PathLike, progress: Progress | None = None) -> Device:
    """Measure the device that `place` lies on; see `examine`."""
    threads = fast_cpus()
    core, rounds = Core(threads), []
    with _reader(Path(place)) as reader:
        reader.settle()
        cells = reader.cells()
        total, done = ROUNDS * (len(cells) + 2), 0

        def count(value: float) -> float:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)
            return value

        for turn in range(ROUNDS):
            flash = [count(reader.rate(*cell, turn)) for cell in cells]
            rounds.append((flash, count(_dram_rate(core)), _multiply_adds(core)))
            count(0)
    flash, dram, compute = zip(*rounds)
    return Device(
        place=str(place), cpu=cpu_name(), threads=threads, measured_at=time(),
        flash=tuple(
            Reading(*cell, rate) for cell, rate in zip(cells, map(statistics.median, zip(*flash)))
        ),
        dram_bytes_per_second=statistics.median(dram),
        multiply_adds={name: statistics.median(c[name] for c in compute) for name in compute[0]},
    )  # fmt: skip


class _Reader:
    """Reads pieces of a file of `size` bytes at `path`."""

    def __init__(self, path: str, size: int, name: Path):
        self._size, self._name = size, name
        self._buffer = Slab(BUFFER_BYTES)
        np.frombuffer(self._buffer.view, np.uint8)[:] = 1  # its memory is there before the reads
        self._at = 0  # of the buffer, from where the next reads go into the half that follows
        direct_fd, is_direct = open_direct(path)
        self._fds = {True: direct_fd} if is_direct else {}
        self._fds[False] = os.open(path, os.O_RDONLY) if is_direct else direct_fd
        places = range(size // MIB)
        self._places = random.Random(0).sample(places, min(len(places), FILE_BYTES // MIB))

    def settle(self) -> None:
        """Read all places once."""
        for place in self._places:
            try:
                os.preadv(next(iter(self._fds.values())), [self._buffer.view[:MIB]], place * MIB)
            except OSError as error:
                raise self._failure(error.errno) from error

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def cells(self) -> list[tuple[str, bool, int, int]]:
        """What can be measured here: engine, direct, bytes, depth."""
        engines = [engine for engine in ENGINES if self._runs(engine)]
        return [
            (engine, direct, size, depth)
            for engine in engines for direct in self._fds for size in SIZES for depth in DEPTHS
            if size * depth <= min(BUFFER_BYTES // 2, self._size)
        ]  # fmt: skip

    def rate(self, engine: str, direct: bool, size: int, depth: int, seed: int) -> float:
        """Bytes per second of pieces in random order, no one twice through the page cache."""
        each = MIB // size
        count = each * len(self._places)
        draws = random.Random(seed).sample(range(count), count)
        offsets = [MIB * self._places[i // each] + size * (i % each) for i in draws]
        if not direct:
            self._forget()
        return self._read(engine, direct, size, depth, offsets * (2 if direct else 1))

    def _runs(self, engine: str) -> bool:
        try:
            self._read(engine, False, SIZES[0], 1, [0])
        except UnsupportedError:
            return False
        return True

    def _forget(self) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fds[False], 0, 0, os.POSIX_FADV_DONTNEED)

    def _read(self, engine: str, direct: bool, size: int, depth: int, offsets: list[int]) -> float:
        places = np.array(offsets, np.uint64)
        at = pointer(places, "uint64_t *")
        pieces = ffi.new("em_pieces *", {"offsets": at, "bytes": size, "n": len(places)})
        pace = ffi.new("em_flash_pace *")
        status = lib.em_flash_measure(
            self._fds[direct], engine.encode(), depth, pieces,
            ffi.cast("void *", self._buffer.address + self._at), BUFFER_BYTES // 2,
            int(1e9 * READ_SECONDS), pace,
        )  # fmt: skip
        most = max(SIZES)
        self._at = (self._at + -(-pace.read_bytes // most) * most) % (BUFFER_BYTES // 2)
        if status == lib.EM_FLASH:
            raise self._failure(pace.error)
        check(status, f"measuring reads by {engine}")
        return 1e9 * pace.read_bytes / max(1, pace.spent_ns)

    def _failure(self, error: int) -> FlashError:
        return FlashError(
            f"measuring reads of {self._name}: {os.strerror(error)}; check the device"
        )


@contextlib.contextmanager
def _reader(place: Path) -> Iterator[_Reader]:
    """A file there, or in a folder one that is written now, and has no name."""
    with contextlib.ExitStack() as stack:
        if place.is_dir():
            file = stack.enter_context(_written(place))
            # Its descriptor is its only name.
            path, size = f"/proc/self/fd/{file.fileno()}", os.fstat(file.fileno()).st_size
            path = path if os.path.exists(path) else f"/dev/fd/{file.fileno()}"
        else:
            path, size = str(place), _file_bytes(place)
        reader = _Reader(path, size, place)
        stack.callback(reader.close)
        yield reader


def _file_bytes(place: Path) -> int:
    if place.exists() and not place.is_file():
        raise FlashError(f"measuring reads of {place}: it is neither a file nor a folder")
    try:
        size = place.stat().st_size
    except OSError as error:
        raise FlashError(
            f"measuring reads of {place}: {error.strerror}; give a folder or a file on the device"
        ) from error
    if size < LEAST_FILE_BYTES:
        raise FlashError(
            f"measuring reads of {place}: it has {show_size(size)}, too few to measure; give one "
            f"of {show_size(LEAST_FILE_BYTES)} or more, or a folder"
        )
    return size


def _written(folder: Path):
    """An open file of random bytes in `folder`, on the device."""
    free = shutil.disk_usage(folder).free
    size = min(FILE_BYTES, free // DISK_SHARE) // MIB * MIB
    advice = "free some, or give a store or a folder elsewhere"
    if size < LEAST_FILE_BYTES:
        raise FlashError(
            f"measuring the device of {folder}: a file of {show_size(LEAST_FILE_BYTES)} would take "
            f"more than a quarter of the {show_size(free)} that are free; {advice}"
        )
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        except OSError as error:
            raise FlashError(
                f"measuring the device of {folder}: writing {show_size(size)}: {error.strerror}; "
                f"{advice}"
            ) from error
        stack.pop_all()
    return file


def _dram_rate(core: Core) -> float:
    """Bytes per second at which all threads read memory and do nothing with it."""
    size = max(16 * MIB, min(MEMORY_BYTES, auto_bytes() // 2))
    slab = Slab(size)
    np.frombuffer(slab.view, np.uint8)[:] = 1  # or all of it were one page of zeros
    started, done = perf_counter(), 0
    while perf_counter() - started < MEMORY_SECONDS:
        core.read_bytes(slab.address, size)
        done += size
    return done / (perf_counter() - started)


def _multiply_adds(core: Core) -> dict[str, float]:
    """Multiply-adds per second of each number format, by all threads."""
    rates = {}
    for dtype in MULTIPLIED:
        items, started, done = core.threads, perf_counter(), 0
        while perf_counter() - started < COMPUTE_SECONDS:
            done += core.multiply_adds(dtype.code, items)
            items *= 2
        rates[dtype.name] = done / (perf_counter() - started)
    return rates


def _file(place: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Where the figures of a place are kept: its name changes with machine and file system."""
    place = Path(place)
    try:
        there = next(p for p in (place, *place.absolute().parents) if p.exists())
        device, files = there.stat().st_dev, os.statvfs(there)
    except (OSError, StopIteration) as error:
        raise FlashError(f"finding the device of {place}: {error}; give another path") from error
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = (cpu_name(), os.cpu_count(), fast_cpus(), pages, os.uname().release)
    facts = (FORMAT, *machine, device, files.f_fsid)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    return Path(folder) / f"doctor-{key}.json"


def _check_writable(folder: Path) -> None:
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise FlashError(
            f"keeping what is measured in {folder}: {error.strerror}; choose another folder with "
            "--cache-dir"
        ) from error


def _keep(device: Device, path: Path) -> None:
    """Written beside and renamed: whoever reads it finds all or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(device)))
        os.replace(part, path)
    except OSError as error:
        raise FlashError(
            f"keeping what was measured in {path.parent}: {error.strerror}; choose another folder "
            "with --cache-dir"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _is_sound(device: Device) -> bool:
    """Whether a file of figures has all that plans take, as numbers that can be."""
    rates = [r.bytes_per_second for r in device.flash]
    rates += [
        device.measured_at,
        device.dram_bytes_per_second,
        *(device.multiply_adds[dtype.name] for dtype in MULTIPLIED),
    ]
    counts = [n for r in device.flash for n in (r.bytes, r.depth)]
    texts = all(isinstance(text, str) for text in (device.place, device.cpu))
    known_engines = all(r.engine in ENGINES for r in device.flash)
    finite = all(0 < rate < float("inf") for rate in rates) and device.measured_at < _YEAR_3000
    counted = all(type(n) is int and 0 < n <= _MOST for n in (*counts, device.threads))
    return bool(counts) and texts and known_engines and finite and counted
