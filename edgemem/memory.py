"""Memory that this process has used, as the system counts it; for all floors, without psutil."""

import re
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The largest number of resident bytes that this process has had, 0 where it is not known."""
    try:
        # Not getrusage, which starts with the peak of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024
    except (OSError, TypeError):
        return _peak_by_rusage()


def major_faults() -> int:
    """Pages that this process had to wait for the disk for, since its start; 0 if not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def available_share() -> float:
    """The share of the machine's memory that is free or easily freed; 1 where it is not known."""
    try:
        facts = Path("/proc/meminfo").read_text()
    except OSError:
        return 1.0
    total, available = (re.search(rf"^{n}:\s*(\d+)", facts, re.M) for n in _SHARE_OF)
    return int(available[1]) / int(total[1]) if total and available else 1.0


_SHARE_OF = ("MemTotal", "MemAvailable")


def _peak_by_rusage() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
