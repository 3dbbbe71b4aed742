"""The memory that this process can still use."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still use: limited by the machine and by its control group (Slurm job).

    Args:
        root: of the file system, for tests.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        own = (root / "proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition(":")[2]
        group = root / "sys/fs/cgroup" / own.lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if limit.exists() and limit.read_text(encoding="utf-8").strip() != "max":
                used = int((folder / "memory.current").read_text(encoding="utf-8")) - _page_cache(folder)
                limits.append(int(limit.read_text(encoding="utf-8")) - used)
    except (OSError, ValueError, IndexError):  # not Linux, or without version 2 of control groups
        pass
    return max(0, min(limits))


def _page_cache(group: Path) -> int:
    """Bytes of files that a control group has in memory. The kernel drops them when memory is needed."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    return int(fields["active_file"]) + int(fields["inactive_file"])
