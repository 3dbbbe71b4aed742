"""The teacher of a stage: a finished run, or weights. It is checked early, and loaded when the stage begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_tl.config import Config, load_saved
from distil_tl.data.config import SPLIT_FILE
from distil_tl.models.trained_file import TrainedFile, load_trained_file
from distil_tl.rundir.directory import check_shared
from distil_tl.training.config import DistillConfig
from distil_tl.training.distillation import Teacher, Teaching, cache_teaching
from distil_tl.training.network import Network, evaluation_network
from distil_tl.training.precision import default_compute, use_benchmark
from distil_tl.training.stage import Stage
from distil_tl.training.stage_setup import StageSetup
from distil_tl.utils.args import read_yaml, refuse
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import read_json
from distil_tl.utils.log import logger, printable

if TYPE_CHECKING:
    from distil_tl.inference import RestoredModel
    from distil_tl.run import Run


def teachers(config: Config) -> dict[str, DistillConfig]:
    """The teacher, by stage, of those that will be trained."""
    stages = {name: stage.distill for name, stage in config.stages.items() if stage.epochs != 0}
    return {name: distill for name, distill in stages.items() if distill.teacher is not None}


def split_of_teacher(config: Config) -> Path | None:
    """The run directory of a teacher whose split a new run holds to; None without one.

    Where the images are divided here, an image that the teacher was trained on must not be in val.
    """
    for distill in teachers(config).values():
        if distill.teacher is None or distill.weights is not None:
            continue
        run_dir = Path(distill.teacher)
        data: dict[str, Any] = read_yaml(run_dir / "config.yaml").get("data") or {}
        same = all(_resolved(data.get(key)) == _resolved(getattr(config.data, key)) for key in ("root", "labels"))
        if same and (run_dir / SPLIT_FILE).is_file():
            return run_dir
    return None


def _resolved(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().resolve()


def refuse_unfit_teachers(config: Config, classes: Sequence[str]) -> None:
    """Raises UserError if a teacher has other classes than the student, whose names are `classes`, or can't be loaded.

    Weights are loaded, as nothing else says whether they can be.
    """
    refuse([problem for name, distill in teachers(config).items() if (problem := _unfit(name, distill, classes))])


def _unfit(stage: str, distill: DistillConfig, classes: Sequence[str]) -> str | None:
    key = f"stages.{stage}.distill"
    shown = f"{key}.teacher={distill.teacher}"
    try:
        known = _classes_of(distill, key, classes)
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{shown}: classes.json can't be read: {error}"
    missing, more = ([name for name in a if name not in set(b)] for a, b in ((classes, known), (known, classes)))
    if not missing and not more:
        return _code_problem(distill, shown)
    parts = [f"it does not know {_some(missing)}"] * bool(missing) + [f"it knows {_some(more)} besides"] * bool(more)
    return f"{shown} has other classes than the images: {', and '.join(parts)}; choose a teacher with the same classes"


def _code_problem(distill: DistillConfig, shown: str) -> str | None:
    """Why the configuration of a teacher that is a run can't be used; one that names code is only found out there."""
    try:
        if distill.weights is None:
            load_saved(Path(str(distill.teacher)))
    except UserError as error:
        return f"{shown}: {error}"
    return None


def _classes_of(distill: DistillConfig, key: str, classes: Sequence[str]) -> list[str]:
    if distill.weights is not None:
        return load_trained_file(distill.weights, distill.model, distill.image_size, classes, key).classes
    known: list[str] = read_json(Path(str(distill.teacher)) / "classes.json")
    return known


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more


def teacher_file(run: Run, stage: Stage) -> TrainedFile | None:
    """The teacher of a stage if it is weights; None if it is a run. A collective.

    Raises:
        UserError: on all ranks alike, one of them does not see it; or as `load_trained_file`.
    """
    distill = stage.config.distill
    path = Path(str(distill.teacher))
    check_shared(run.info, path, path.exists, "a teacher")
    if distill.weights is None:
        return None
    classes = run.source.index("train").classes
    return load_trained_file(
        distill.weights, distill.model, distill.image_size, classes, f"stages.{stage.name}.distill"
    )


def add_teacher(run: Run, stage: Stage, setup: StageSetup, trained: RestoredModel | TrainedFile) -> StageSetup:
    """The set-up of a stage with its teacher, whose outputs are cached if the stage trains on features. A collective.

    Args:
        trained: the teacher.

    Raises:
        UserError: the teacher is not the one that the stage began with.
    """
    config, record, device = stage.config.distill, run.state.stages[stage.name], run.info.device
    order = [trained.classes.index(name) for name in run.source.index("train").classes]
    found: dict[str, Any]
    if isinstance(trained, TrainedFile):
        compute = default_compute(stage.precision, trained.model.module, device)
        network: Network = evaluation_network(trained.model, compute, device, trained.image_size)
        found, label = {"weights": config.teacher, "model": trained.model.name}, trained.file.name
    else:
        network = trained.network(device)
        found, label = {"run_dir": config.teacher, "checkpoint": trained.checkpoint.name}, trained.checkpoint.name
    teacher = Teacher(trained.model, network, trained.image_size, order)
    found["digest"] = teacher.digest
    if record.teacher is not None and record.teacher["digest"] != found["digest"]:
        raise UserError(
            f"stages.{stage.name}.distill.teacher={config.teacher} is not the model that this stage began with "
            f"({record.teacher.get('checkpoint', 'another file')} then, {label} now): restore it, or choose another "
            f"run_dir"
        )
    record.teacher = found
    logger.info(
        "stage %s learns from %s (%s, %d px, %s)", stage.name, config.teacher, trained.model.name,
        trained.image_size, teacher.compute,
    )  # fmt: skip
    teaching = Teaching(teacher, config)
    if setup.features is not None:
        teaching = cache_teaching(run.info, stage, teaching, run.source, record, run.agreement)
    use_benchmark(setup.network.compute)  # loading the teacher set its own
    return dataclasses.replace(setup, teaching=teaching)
