"""Memory control groups for measurements and tests: a process and its page cache, held to a limit.

```python
with MemoryGroup(64 << 20) as group:
    subprocess.run(group.command([sys.executable, "child.py"]))
    print(group.peak_bytes(), group.cache_bytes())
```
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemem import budget

_WAIT_SECONDS = 10
_numbers = itertools.count()


class NoControlGroup(OSError):
    """No memory control group can be made here."""


@dataclass(frozen=True)
class _Files:
    """What one version of control groups calls things; `cache` is a line of memory.stat."""

    limit: str
    with_swap: str
    swap_too: bool
    peak: str
    cache: str
    events: str


_FILES = {
    1: _Files(
        "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", True,
        "memory.max_usage_in_bytes", "cache", "memory.oom_control",
    ),
    2: _Files("memory.max", "memory.swap.max", False, "memory.peak", "file", "memory.events"),
}  # fmt: skip


class MemoryGroup:
    """A new control group whose processes, page cache counted, have `limit` bytes and no swap.

    Wants root, or a hierarchy that was delegated. The end of the context kills what still runs in
    it and removes it. Raises NoControlGroup with the reasons.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._folder, version = _made()
        self._files = _FILES[version]
        try:
            (self._folder / self._files.limit).write_text(str(limit))
            swap = self._folder / self._files.with_swap
            if swap.exists():  # absent where the kernel does not account for swap
                swap.write_text(str(limit if self._files.swap_too else 0))
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    def command(self, argv: Sequence[str]) -> list[str]:
        """A command that runs `argv` in the group from its first byte on, with the same pid."""
        join = 'echo $$ >"$0" && exec "$@"'
        return ["/bin/sh", "-c", join, str(self._folder / "cgroup.procs"), *argv]

    def peak_bytes(self) -> int | None:
        """The most that was ever charged to the group; None where the kernel does not tell."""
        try:
            return int((self._folder / self._files.peak).read_text())
        except OSError:  # version 2 before Linux 5.19
            return None

    def cache_bytes(self) -> int:
        """Page cache (and shared memory) charged now; it stays when the processes have ended."""
        return self._number("memory.stat", self._files.cache)

    def kills(self) -> int:
        """How many processes the kernel has killed to keep the limit."""
        return self._number(self._files.events, "oom_kill")

    def remove(self) -> None:
        """Kill every process in the group and remove it. Removing twice is fine."""
        until = time.monotonic() + _WAIT_SECONDS
        while self._folder.exists():
            for pid in (self._folder / "cgroup.procs").read_text().split():
                _kill(int(pid))
            try:
                self._folder.rmdir()
            except OSError:  # its processes have not ended yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def _number(self, file: str, name: str) -> int:
        text = (self._folder / file).read_text()
        match = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
        return int(match[1]) if match else 0


def _made() -> tuple[Path, int]:
    """A new folder and its version, as far out as possible: a group of version 2 that has processes
    of its own can have no limited groups inside it, and limits of others should not interfere."""
    reasons = []
    for parent, version in reversed(list(budget._groups(Path("/"), "memory"))):
        folder = parent / f"edgemem-{os.getpid()}-{next(_numbers)}"
        if not (parent / ("cgroup.controllers" if version == 2 else _FILES[1].limit)).exists():
            continue  # not a control group: the other version is mounted here
        try:
            if version == 2:
                _pass_on_memory(parent / "cgroup.subtree_control")
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        if (folder / _FILES[version].limit).exists():
            return folder, version
        folder.rmdir()
        reasons.append(f"{parent}: it controls no memory")
    raise NoControlGroup("making a memory control group: " + ("; ".join(reasons) or "none is here"))


def _pass_on_memory(control: Path) -> None:
    if "memory" not in control.read_text().split():
        control.write_text("+memory")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def evict(path: str | os.PathLike) -> None:
    """Drop the page cache of a file, so that it is cold and whoever reads it next is charged.

    Pages that another process has mapped stay.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # dirty pages would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
