"""Files in memory, through which processes share arrays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LINUX = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


def files_in_memory() -> set[int]:
    """The inode numbers of the files in memory that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:distil_tl" in line}
