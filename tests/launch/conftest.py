from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.helpers.fake_slurm import FakeSlurm

if TYPE_CHECKING:
    from tests.helpers.adaptive_jobs import Jobs


@pytest.fixture
def search_file(slurm: FakeSlurm) -> Path:
    """`rates.yaml`, a search space, in the current folder."""
    from tests.helpers.adaptive_jobs import SPACE  # imports Optuna

    Path("rates.yaml").write_text(SPACE)
    return Path("rates.yaml")


@pytest.fixture
def jobs(slurm: FakeSlurm, search_file: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Simulated jobs, which proceed while the search sleeps; all have the same curve unless a test sets another."""
    from launch import optuna_driver
    from tests.helpers.adaptive_jobs import Jobs

    jobs = Jobs(slurm, lambda values: [0.5, 0.6])
    monkeypatch.setattr(optuna_driver, "time", SimpleNamespace(sleep=jobs.sleep))
    return jobs
