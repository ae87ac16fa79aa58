"""What the model did, step by step: the numbers behind every report."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

PHASES = ("prefill", "decode")
COUNTERS = ("hits", "misses", "read_bytes", "stall_us", "busy_us")
"""What streaming did in a step: bundles, bytes that arrived, and times that reads took."""
RECENT_STEPS = 4096
"""Steps kept one by one; older ones live on in the totals only."""


@dataclass(frozen=True)
class Step:
    """One forward pass: its tokens, its seconds, and the bundle bytes that it demanded.

    `withheld_bytes` are those that slots had to leave because the system was short of memory.
    """

    phase: str
    tokens: int
    seconds: float
    demand_bytes: int
    withheld_bytes: int = 0
    counters: dict[str, int] = field(default_factory=dict)


@dataclass
class _Total:
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    demand_bytes: int = 0
    withheld_bytes: int = 0
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))


class Trace:
    """Records steps; may be written and read from several threads."""

    def __init__(self):
        self.recent: deque[Step] = deque(maxlen=RECENT_STEPS)
        self._lock = threading.Lock()
        self._totals = {phase: _Total() for phase in PHASES}

    def record(
        self, phase: str, tokens: int, seconds: float, demand_bytes: int = 0,
        withheld_bytes: int = 0, **counters: int,
    ) -> None:  # fmt: skip
        """Add one step; `phase` is one of PHASES, `counters` are of COUNTERS."""
        with self._lock:
            step = Step(phase, tokens, seconds, demand_bytes, withheld_bytes, counters)
            self.recent.append(step)
            total = self._totals[phase]
            for name, value in counters.items():
                total.counters[name] += value
            total.steps += 1
            total.tokens += tokens
            total.seconds += seconds
            total.demand_bytes += demand_bytes
            total.withheld_bytes = max(total.withheld_bytes, withheld_bytes)

    def clear(self) -> None:
        """Forget everything, so that what follows is measured alone."""
        with self._lock:
            self.recent.clear()
            self._totals = {phase: _Total() for phase in PHASES}

    def summary(self) -> dict:
        """For each phase: steps, tokens, seconds, tokens_per_second, demand_bytes_per_token; and of
        streaming hits, misses, hit_rate (None of nothing), read_bytes_per_token, the seconds that
        products stalled and that the device read, their shares, and the most withheld_bytes."""
        with self._lock:
            return {phase: _summarize(total) for phase, total in self._totals.items()}


def _summarize(total: _Total) -> dict:
    hits, misses = total.counters["hits"], total.counters["misses"]
    stall, device = total.counters["stall_us"] / 1e6, total.counters["busy_us"] / 1e6
    return {
        "steps": total.steps,
        "tokens": total.tokens,
        "seconds": total.seconds,
        "tokens_per_second": _ratio(total.tokens, total.seconds),
        "demand_bytes_per_token": _ratio(total.demand_bytes, total.tokens),
        "hits": hits,
        "misses": misses,
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "read_bytes_per_token": _ratio(total.counters["read_bytes"], total.tokens),
        "stall_seconds": stall,
        "stall_share": _ratio(stall, total.seconds),
        "device_seconds": device,
        "device_share": _ratio(device, total.seconds),
        "withheld_bytes": total.withheld_bytes,
    }


def _ratio(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0
