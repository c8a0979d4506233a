"""How much memory this process has and had."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Return the resident memory of this process; where it is not known, the peak so far."""
    return _from_status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident memory that this process had so far; 0 where it is not known (Windows)."""
    found = _from_status("VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _from_status(key: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
