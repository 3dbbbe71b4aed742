"""A run that is killed, signalled, out of disk space or damaged at any moment ends with the same result."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from tests.helpers.arguments import small_args
from tests.helpers.chaos import KINDS, Fault
from tests.helpers.chaos_plans import Plan, carry_out, make_reference, random_plan, table
from tests.helpers.images import make_folder
from tests.helpers.ranks import run_ranks, train
from tests.helpers.same_run import Reference

JOB = """
stages:
  head: {unfreeze: head, epochs: 1, lr: 0.01, augment: light}
  top: {unfreeze: 2, epochs: 1, lr: 0.001, augment: strong, ema: 0.9}
  all: {unfreeze: all, epochs: 1, lr: 0.001, augment: strong, mixup: 0.3, cutmix: 1, wise_ft: true}
"""
VARIANTS = {
    "sgd": ["optim.name=sgd"],
    "features": [
        "optim.name=sgd",
        "data.split.seed=5",
        "stages.head.views=2",
        "stages.head.epochs=3",
        "stages.head.patience=1",
        "data.balance=sampler",
        "optim.loss=focal",
        "metric=balanced_accuracy",
    ],
    # Dropout and BatchNorm depend on the images of a rank: exact only on the same number of ranks.
    "dropout": [
        "optim.name=adamw",
        "model.name=mobilenet_v3_small",
        "stages.all.batch_norm=train",
        "stages.all.ema=0.8",
    ],
}


# The stages that learn from a teacher: one whose outputs are cached, and one that computes them in each step.
TAUGHT = {"sgd": ["all"], "features": ["head", "top"]}


def make_teacher(folder: Path, run_dir: Path) -> Path:
    args = [*small_args(folder), "data.image_size=48", "stages.head.epochs=1", "stages.full.epochs=0"]
    assert run_ranks(1, train, [*args, f"run_dir={run_dir}"]) == [0]
    return run_dir


def job_args(folder: Path, where: Path, variant: str, teacher: Path) -> list[str]:
    path = where / "job.yaml"
    path.write_text(JOB)
    if variant == "features":  # a folder without a split, which the run makes
        folder = make_folder(where / "flat", {"": 70})
    general = [arg for arg in small_args(folder) if not arg.startswith("stages.")]
    more = ["checkpoint.every_steps=2", "distributed.timeout_seconds=30"]
    taught = [f"stages.{stage}.distill.teacher={teacher}" for stage in TAUGHT.get(variant, [])]
    return [str(path), *general, *VARIANTS[variant], *taught, *more]


@pytest.fixture(scope="module")
def references(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    teacher = make_teacher(folder, tmp_path_factory.mktemp("teacher") / "run")

    @functools.cache
    def reference(variant: str) -> tuple[list[str], Reference]:
        where = tmp_path_factory.mktemp(f"reference-{variant}")
        args = job_args(folder, where, variant, teacher)
        return args, make_reference(where, args)

    return reference


# Each kind of fault at another moment: the numbers of ranks of the attempts, the faults that end all but the last of
# them, and where in its region each one strikes, from 0 to 1. A later attempt has only the lines of the work left.
SHORT = {
    "all killed while features are computed, then a signal to one rank in start-up": (
        (2, 2, 2),
        [Fault("kill all", "start-up", 0, 0), Fault("term", "start-up", 1, 0)],
        (0.999, 0.01),
    ),
    "one rank killed in a step, then all in a checkpoint": (
        (2, 2, 2),
        [Fault("kill one", "step", 1, 0), Fault("kill all", "checkpoint", 0, 0)],
        (0.3, 0.4),
    ),
    "a signal in an evaluation, then a full disk, then two signals": (
        (2, 2, 2, 2),
        [
            Fault("usr2", "evaluation", 1, 0),
            Fault("disk full", "step", 0, 0, 0.2),
            Fault("twice", "step", 1, 0),
        ],
        (0.1, 0.2, 0.2),
    ),
    "damage, then a signal to a single rank, then four ranks": (
        (2, 1, 4),
        [Fault("flipped", "step", 0, 0), Fault("int", "step", 0, 0)],
        (0.6, 0.2),
    ),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_run_ends_as_if_nothing_had_happened(references, tmp_path: Path, name: str) -> None:
    worlds, wanted, shares = SHORT[name]
    variant = "features" if "features" in name else "dropout" if "checkpoint" in name else "sgd"
    args, reference = references(variant)
    faults = [
        Fault(fault.kind, fault.region, fault.by, int(reference.counted[fault.by][fault.region] * share), fault.chance)
        for fault, share in zip(wanted, shares, strict=True)
    ]
    outcome = carry_out(Plan(name, tuple(args), variant, worlds, tuple(faults), 0), tmp_path, reference)
    assert not outcome.problems, "\n".join([*outcome.notes, *outcome.problems])
    assert sum(" at " in note for note in outcome.notes) == len(faults), outcome.notes


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_chaos(references, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    outcomes = []
    for number in range(3 * len(KINDS)):
        kind = KINDS[number % len(KINDS)]
        final = (2, 2, 1, 2, 4)[(number + number // len(KINDS)) % 5]
        variant = "dropout" if final == 2 and number % 3 == 0 else "features" if number % 3 == 1 else "sgd"
        args, reference = references(variant)
        plan = random_plan(number, args, variant, kind, reference, final)
        outcomes.append(carry_out(plan, tmp_path / plan.name, reference))
    with capsys.disabled():
        print(f"\n{table(outcomes)}\n{time.monotonic() - began:.0f} s")  # noqa: T201
    problems = [f"{o.plan}\n" + "\n".join([*o.notes, *o.problems]) for o in outcomes if o.problems]
    assert not problems, "\n\n".join(problems)
