"""What benchmarks share: repeated timing, spread, the ceiling of this host, and its fingerprint."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgemem._native import Slab
from edgemem.benchmark import cpu_name
from edgemem.kernels import Core

QUIET_CORES = 0.1
"""Other work below this does not matter."""


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated measurements, all in one unit."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def rounds(works: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Amounts per second of several kinds of work in each of the runs, taken in turn: A B C, C B A,
    …, so that drift of the machine falls on all alike, and what one leaves behind, such as threads
    that go on spinning, not always on the same. Each function does its work once and returns how
    much it was; what it does first, before the runs, is not timed."""
    for work in works.values():
        work()
    found, order = {name: [] for name in works}, list(works.items())
    for _ in range(runs):
        for name, work in order:
            started = time.perf_counter()
            amount = work()
            found[name].append(amount / (time.perf_counter() - started))
        order.reverse()
    return found


def rates(works: dict[str, Callable[[], float]], runs: int) -> dict[str, Spread]:
    """The spread of each kind of work's `rounds`."""
    return {name: spread(values) for name, values in rounds(works, runs).items()}


class PlainRead:
    """Reading memory and doing nothing with it: what bounds any product over the same bytes."""

    def __init__(self, core: Core, size: int):
        self._core, self._slab = core, Slab(size)
        for start in range(0, size, 1 << 20):  # touch every page, or zero pages would be read
            self._slab.view[start : start + 1] = b"\1"

    def __call__(self) -> int:
        self._core.read_bytes(self._slab.address, self._slab.bytes)
        return self._slab.bytes


def fingerprint() -> str:
    """The host in one line, as far as it tells: processor, cores, memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that other work keeps busy while nothing is measured here; 0 where it is not known."""

    def used() -> int:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _wait, irq, soft = map(int, file.readline().split()[1:8])
        return user + nice + system + irq + soft

    try:
        before = used()
        time.sleep(seconds)
        return (used() - before) / os.sysconf("SC_CLK_TCK") / seconds
    except (OSError, ValueError):
        return 0.0
