"""The teacher of a stage: a finished run, checked early and loaded when the stage begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_tl.data.config import SPLIT_FILE
from distil_tl.training.distillation import Teacher, Teaching, cache_teaching
from distil_tl.training.precision import use_benchmark
from distil_tl.training.stage import Stage
from distil_tl.training.stage_setup import StageSetup
from distil_tl.utils.args import read_yaml, refuse
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger, printable

if TYPE_CHECKING:
    from distil_tl.config import Config
    from distil_tl.inference import RestoredModel
    from distil_tl.run import Run


def teachers(config: Config) -> dict[str, Path]:
    """The run directory of the teacher, by stage, of those that will be trained."""
    stages = {name: stage for name, stage in config.stages.items() if stage.epochs != 0}
    return {name: Path(stage.distill.teacher) for name, stage in stages.items() if stage.distill.teacher is not None}


def split_of_teacher(config: Config) -> Path | None:
    """The run directory of a teacher whose split a new run holds to; None without one.

    Where the images are divided here, an image that the teacher was trained on must not be in val.
    """
    for run_dir in teachers(config).values():
        data: dict[str, Any] = read_yaml(run_dir / "config.yaml").get("data") or {}
        same = all(_resolved(data.get(key)) == _resolved(getattr(config.data, key)) for key in ("root", "labels"))
        if same and (run_dir / SPLIT_FILE).is_file():
            return run_dir
    return None


def _resolved(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().resolve()


def refuse_unfit_teachers(config: Config, classes: Sequence[str]) -> None:
    """Raises UserError if a teacher has other classes than the student, whose names are `classes`."""
    refuse([problem for name, run_dir in teachers(config).items() if (problem := _unfit(name, run_dir, classes))])


def _unfit(stage: str, run_dir: Path, classes: Sequence[str]) -> str | None:
    try:
        known = json.loads((run_dir / "classes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"stages.{stage}.distill.teacher={run_dir}: classes.json can't be read: {error}"
    missing, more = ([name for name in a if name not in set(b)] for a, b in ((classes, known), (known, classes)))
    if not missing and not more:
        return None
    parts = [f"it does not know {_some(missing)}"] * bool(missing) + [f"it knows {_some(more)} besides"] * bool(more)
    return (
        f"stages.{stage}.distill.teacher={run_dir} has other classes than the images: {', and '.join(parts)}; choose "
        f"a teacher with the same classes"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more


def add_teacher(run: Run, stage: Stage, setup: StageSetup, restored: RestoredModel) -> StageSetup:
    """The set-up of a stage with its teacher, whose outputs are cached if the stage trains on features. A collective.

    Args:
        restored: the teacher.

    Raises:
        UserError: the teacher is not the one that the stage began with.
    """
    config, record = stage.config.distill, run.state.stages[stage.name]
    assert config.teacher is not None
    order = [restored.classes.index(name) for name in run.source.index("train").classes]
    network = restored.network(run.info.device)
    teacher = Teacher(restored.model, network, restored.image_size, order)
    found = {"run_dir": config.teacher, "checkpoint": restored.checkpoint.name, "digest": teacher.digest}
    if record.teacher is not None and record.teacher["digest"] != found["digest"]:
        raise UserError(
            f"stages.{stage.name}.distill.teacher={config.teacher} is not the model that this stage began with "
            f"({record.teacher['checkpoint']} then, {found['checkpoint']} now): restore it, or choose another run_dir"
        )
    record.teacher = found
    logger.info(
        "stage %s learns from %s (%s, %d px, %s)", stage.name, config.teacher, restored.model.name,
        restored.image_size, teacher.compute,
    )  # fmt: skip
    teaching = Teaching(teacher, config)
    if setup.features is not None:
        teaching = cache_teaching(run.info, stage, teaching, run.source, record, run.agreement)
    use_benchmark(setup.network.compute)  # loading the teacher set its own
    return dataclasses.replace(setup, teaching=teaching)
