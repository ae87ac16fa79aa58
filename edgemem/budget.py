"""The memory budget of the whole process: its size, what is promised, and refusals with sums."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import psutil

from . import memory
from .errors import BudgetError

MIB = 1 << 20
GIB = 1 << 30

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": MIB, "g": GIB, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%)|([kmgt]?)(?:i?b)?)", re.IGNORECASE)
_LARGEST = 1 << 60
_UNLIMITED = 1 << 60
"""Control groups write numbers near 2^63 for "no limit"."""

_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""Limit and use, by version of control groups, and what memory.stat calls idle page cache."""


def parse_size(text: str | int) -> int:
    """Bytes of a size: an int, "4GiB", "4G", "512 MB" (powers of 1024), "50%" (of this machine).

    Raises TypeError or ValueError.
    """
    if isinstance(text, Integral) and not isinstance(text, bool):
        size = int(text)
    elif isinstance(text, str):
        match = _SIZE.fullmatch(text.strip())
        if not match:
            raise ValueError(f"{text!r} is not a memory size; write 4GiB, 512M, 50% or auto")
        number, percent, unit = match.groups()
        scale = machine_bytes() / 100 if percent else _UNITS[unit.lower()]
        size = float(number) * scale
        if size > _LARGEST:
            raise ValueError(f"a memory size must be at most {_LARGEST >> 40} TiB, not {text:.40}")
        size = int(size)
    else:
        raise TypeError(f"a memory size is an int or a str, not {type(text).__name__}")
    if size <= 0:
        raise ValueError(f"a memory size must be above zero, not {text!s:.40}")
    return size


def show_size(size: float) -> str:
    """A size for people: three digits or so, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def machine_bytes(root: Path = Path("/")) -> int:
    """All the memory this process could ever have: physical memory or its control group's limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_groups(root))])


def auto_bytes(root: Path = Path("/")) -> int:
    """A budget that leaves the rest of the machine alone.

    What is free for this process (available memory, and room in every control group around it),
    plus what it has already, less a reserve of a tenth, between 128 MiB and 1 GiB, but never over
    half.
    """
    free = min([psutil.virtual_memory().available, *(l - used for l, used in _memory_groups(root))])
    whole = max(0, free) + current_bytes()
    reserve = min(max(whole // 10, 128 * MIB), GIB, whole // 2)
    return whole - reserve


def current_bytes() -> int:
    """Resident bytes of this process now."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The largest number of resident bytes that this process has had."""
    return memory.peak_bytes() or psutil.Process().memory_info().peak_wset


def usable_cpus(root: Path = Path("/")) -> int:
    """Processor cores that this process may use: its affinity, or its control groups' quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for group, version in _groups(root, "cpu"):
        try:
            if version == 2:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = (int((group / name).read_text()) for name in names)
        except (OSError, ValueError):  # the file is absent, or says "max"
            continue
        if quota > 0 and period > 0:
            cores = min(cores, -(-quota // period))
    return max(1, cores)


def fast_cpus(root: Path = Path("/")) -> int:
    """How many of the usable cores are worth a thread: where they differ, those of at least half
    the best one's capacity, since all wait for the slowest in each part of a step.

    Source: cpu_capacity in Linux's Documentation/ABI/testing/sysfs-devices-system-cpu.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    capacities = []
    for cpu in affinity(0) if affinity else ():
        try:
            told = (root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity").read_text()
            capacities.append(int(told))
        except (OSError, ValueError):  # all cores are alike, or nobody knows
            return usable_cpus(root)
    fast = sum(2 * capacity >= max(capacities) for capacity in capacities)
    return max(1, min(usable_cpus(root), fast or usable_cpus(root)))


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of the control groups around this process, innermost first, with their version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            base, version = root / "sys/fs/cgroup" / controllers, 1
            base = base if base.is_dir() else root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = base / path.lstrip("/")
        # In a container the path may be that of the host; the base is always the container's own.
        for group in [folder, *folder.parents]:
            if group == base or base in group.parents:
                yield group, version


def _memory_groups(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each control group around this process that limits memory.

    Page cache that nobody uses is not "used": it goes when memory is wanted.
    """
    found = []
    for group, version in _groups(root, "memory"):
        limit, used, cache = _MEMORY_FILES[version]
        try:
            limit_bytes = int((group / limit).read_text())
            used_bytes = int((group / used).read_text())
            statistics = (group / "memory.stat").read_text()
        except (OSError, ValueError):  # the file is absent, or says "max"
            continue
        if limit_bytes < _UNLIMITED:
            match = re.search(rf"^{cache} (\d+)", statistics, re.MULTILINE)
            found.append((limit_bytes, max(0, used_bytes - (int(match[1]) if match else 0))))
    return found


@dataclass(frozen=True)
class Item:
    """One line of the sum."""

    label: str
    bytes: int


class Budget:
    """A limit on the bytes of the process and what has been promised so far. Thread-safe."""

    def __init__(self, memory: str | int = "auto"):
        if isinstance(memory, str) and memory.strip().lower() == "auto":
            self.limit, self._source = auto_bytes(), "auto: what is free here, less a reserve"
        else:
            asked, whole = parse_size(memory), machine_bytes()
            self.limit = min(asked, whole)
            self._source = "as asked" if asked <= whole else "all that this machine has"
        self._items: list[Item] = []
        self._lock = threading.RLock()

    @property
    def promised(self) -> int:
        return sum(item.bytes for item in self._items)

    @property
    def spare(self) -> int:
        """What the limit leaves for more promises."""
        return max(0, self.limit - self.promised)

    def take(
        self, items: Sequence[Item],
        advise: Callable[[Sequence[Item], int], list[str]] | None = None, what: str = "the model",
    ) -> None:  # fmt: skip
        """Promise all `items`, or raise BudgetError with the whole sum and what would fit.

        `advise(items, spare)` gives lines of advice; `spare` is what the limit leaves for `items`.
        `what` is what the refusal says does not fit.
        """
        with self._lock:
            spare = self.limit - self.promised
            if sum(item.bytes for item in items) > spare:
                advice = advise(items, spare) if advise else []
                raise BudgetError(self._refusal(what, [*self._items, *items], advice))
            self._items += items

    def give_back(self, items: Sequence[Item]) -> None:
        """End a promise made with the same items."""
        with self._lock:
            for item in items:
                self._items.remove(item)

    def _refusal(self, what: str, items: Sequence[Item], advice: Sequence[str]) -> str:
        total = sum(item.bytes for item in items)
        rows = [*items, Item("sum", total), Item(f"budget ({self._source})", self.limit)]
        sizes = [show_size(row.bytes) for row in rows]
        left, right = max(len(row.label) for row in rows), max(map(len, sizes))
        sum_lines = [f"{r.label:<{left}}  {s:>{right}}" for r, s in zip(rows, sizes, strict=True)]
        excess = show_size(total - self.limit)
        head = f"{what} does not fit the memory budget: {excess} too much"
        return "\n  ".join([head, *sum_lines, *advice])
