"""Signals that end a process, handled while there is something to tidy up."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(handler: Callable[[int, object], None], *names: str) -> Iterator[None]:
    """Give the signals of these names to `handler(number, frame)`, where they would end us.

    What is ignored (nohup) stays so, and what the system lacks is passed over; only the main thread
    may ask for signals, so that in others nothing changes.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ends = (signal.SIG_DFL, signal.default_int_handler)
    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if is_main and signal.getsignal(n) in ends}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def unwind(number: int, _frame) -> None:
    """Unwind as Ctrl-C does, so that no half of a store stays behind, and no child."""
    with contextlib.suppress(OSError):  # a terminal that hung up takes no message
        os.write(2, f"\nedgemem: ended by {signal.Signals(number).name}\n".encode())
    sys.exit(128 + number)


def end_with(parent: int) -> None:
    """Have the system end this process as soon as `parent`, which started it, is gone, however that
    ends (Linux; elsewhere a process outlives one that was killed)."""
    import ctypes

    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError, TypeError):
        return
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


_PR_SET_PDEATHSIG = 1


def main_code() -> str:
    """Python code of a child that runs edgemem's commands: the same edgemem as this process's, and
    nothing of the current folder; it ends with this process."""
    return (
        f"import sys; sys.path[:] = {sys.path!r}; from edgemem.cli.signals import end_with; "
        f"end_with({os.getpid()}); from edgemem.__main__ import main; main()"
    )
