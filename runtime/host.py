"""What this process may use: CPUs and memory of its cgroup, not of the node it landed on."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60  # cgroup v1 says "no limit" with a number near 2**63


def cpu_count(root: Path = CGROUP) -> int:
    """Return how many CPUs' worth of time there is, at least one.

    OpenMP would start a thread for each CPU of the node, and a quota of two would make them wait
    for one another most of the time.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = _cpu_quota(root)
    return max(1, min(allowed, int(quota))) if quota else allowed


def memory_available_bytes(root: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return how many bytes may still be allocated.

    The cgroup counts files that were read, too; those nobody has mapped make room when need be.
    """
    free = _meminfo_available(meminfo)
    limit = _read_int(root / "memory.max") or _read_int(root / "memory/memory.limit_in_bytes")
    if limit is None or limit >= UNLIMITED_BYTES:
        return free
    used = (
        _read_int(root / "memory.current") or _read_int(root / "memory/memory.usage_in_bytes") or 0
    )
    return max(0, min(free, limit - used + _read_files(root / "memory.stat")))


def _read_files(stat: Path) -> int:
    """Return the bytes of files that are kept only because there was room for them."""
    try:
        lines = (line.split() for line in stat.read_text().splitlines())
        counts = {name: int(value) for name, value in lines}
    except (OSError, ValueError):
        return 0
    kept = counts.get("active_file", 0) + counts.get("inactive_file", 0)
    return max(0, kept - counts.get("file_mapped", 0))


def _cpu_quota(root: Path) -> float | None:
    unified = root / "cpu.max"
    if unified.exists():
        quota, period = unified.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us = _read_int(root / "cpu/cpu.cfs_quota_us")
    period_us = _read_int(root / "cpu/cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _meminfo_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or the word "max"
        return None
