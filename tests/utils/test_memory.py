"""The memory that a process can still use, by the files of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_tl.utils.memory import available_memory

GIB = 2**30


def group(folder: Path, limit: str, current: int, active: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {active}\ninactive_file {inactive}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}[name])
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {50 * GIB // 1024} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7\n")
    return tmp_path


def test_without_a_limit_it_is_what_the_machine_has(root: Path) -> None:
    assert available_memory(root) == 50 * GIB
    group(root / "sys/fs/cgroup/slurm/job_7", "max", 40 * GIB, 0, 0)
    assert available_memory(root) == 50 * GIB
    assert available_memory(root / "nowhere") == 64 * GIB


def test_the_limit_of_a_job_without_its_page_cache(root: Path) -> None:
    """After an epoch, the images that were read fill what the job may use; the kernel drops them when it has to."""
    job = root / "sys/fs/cgroup/slurm/job_7"
    group(job, str(32 * GIB), 31 * GIB, 20 * GIB, 5 * GIB)
    assert available_memory(root) == 26 * GIB
    group(job, str(32 * GIB), 33 * GIB, 0, 0)
    assert available_memory(root) == 0


def test_a_group_above_may_have_the_lower_limit(root: Path) -> None:
    group(root / "sys/fs/cgroup/slurm/job_7", str(32 * GIB), 1 * GIB, 0, 0)
    group(root / "sys/fs/cgroup/slurm", str(8 * GIB), 2 * GIB, 0, 0)
    assert available_memory(root) == 6 * GIB
