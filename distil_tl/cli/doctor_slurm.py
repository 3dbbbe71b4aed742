"""The checks of `distil-tl doctor` that need the section `slurm`, and the package launch."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distil_tl.doctor.lines import Report
from distil_tl.doctor.slurm import GROUP, judge_partition
from distil_tl.utils.errors import UserError

if TYPE_CHECKING:
    from distil_tl.cli.doctor_plan import Plan
    from distil_tl.doctor.facts import Facts


def judge_slurm(report: Report, plan: Plan, everyone: Sequence[Facts]) -> None:
    """Lines about the section `slurm`, and about Slurm on this machine."""
    slurm = plan.slurm
    assert slurm is not None
    if plan.is_submission:
        preflight = importlib.import_module("launch.preflight")
        problems = preflight.submission_problems(plan.config, slurm, "slurm")
        for problem in problems:
            named = problem.startswith("the weights of") and any(each.weights is not None for each in everyone)
            if problem not in plan.problems and not named:
                report.fail(GROUP, "slurm", problem)
        if not problems:
            report.ok(GROUP, "slurm", f"{slurm.nodes} nodes x {slurm.tasks} tasks x {slurm.cpus_per_task} CPUs")
            judge_job(report, plan)
        report.ok(GROUP, "nodes", "not looked at: run this command with srun in a job to check the nodes themselves")
    judge_partition(report, slurm.partition, slurm.gpus, slurm.tasks * slurm.cpus_per_task)


def judge_job(report: Report, plan: Plan) -> None:
    """A line about whether Slurm could run the job."""
    if shutil.which("sbatch") is None:
        return
    executor, test_only = (importlib.import_module(f"launch.{name}") for name in ("executor", "test_only"))
    folder = Path(plan.config.run_dir or "run").absolute()
    try:
        script = executor.sbatch_script(folder, plan.slurm, "slurm", name=folder.name)
        warning = test_only.find_obstacle(script, plan.slurm)
    except UserError as error:
        report.fail(GROUP, "job", str(error))
        return
    if warning is not None:
        report.warn(GROUP, "job", warning)
    else:
        report.ok(GROUP, "job", "Slurm can run it (sbatch --test-only)")
