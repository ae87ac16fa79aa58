"""What the model did, step by step: the numbers behind every report."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

PHASES = ("prefill", "decode")
RECENT_STEPS = 4096
"""Steps kept one by one; older ones live on in the totals only."""


@dataclass(frozen=True)
class Step:
    """One forward pass: its tokens, its seconds, and the bundle bytes that it demanded."""

    phase: str
    tokens: int
    seconds: float
    demand_bytes: int


@dataclass
class _Total:
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    demand_bytes: int = 0


class Trace:
    """Records steps; may be written and read from several threads."""

    def __init__(self):
        self.recent: deque[Step] = deque(maxlen=RECENT_STEPS)
        self._lock = threading.Lock()
        self._totals = {phase: _Total() for phase in PHASES}

    def record(self, phase: str, tokens: int, seconds: float, demand_bytes: int = 0) -> None:
        """Add one step; `phase` is one of PHASES."""
        with self._lock:
            self.recent.append(Step(phase, tokens, seconds, demand_bytes))
            total = self._totals[phase]
            total.steps += 1
            total.tokens += tokens
            total.seconds += seconds
            total.demand_bytes += demand_bytes

    def clear(self) -> None:
        """Forget everything, so that what follows is measured alone."""
        with self._lock:
            self.recent.clear()
            self._totals = {phase: _Total() for phase in PHASES}

    def summary(self) -> dict:
        """For each phase: steps, tokens, seconds, tokens_per_second, demand_bytes_per_token."""
        with self._lock:
            return {phase: _summarize(total) for phase, total in self._totals.items()}


def _summarize(total: _Total) -> dict:
    return {
        "steps": total.steps,
        "tokens": total.tokens,
        "seconds": total.seconds,
        "tokens_per_second": total.tokens / total.seconds if total.seconds > 0 else 0.0,
        "demand_bytes_per_token": total.demand_bytes / total.tokens if total.tokens else 0.0,
    }
