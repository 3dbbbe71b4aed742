"""The run that `distil-tl doctor` examines, and the checks that need its whole configuration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distil_tl import config as configuration
from distil_tl.auto_settings import auto_problem, describe_auto, resolve_auto
from distil_tl.cli.doctor_slurm import judge_slurm
from distil_tl.config import Config
from distil_tl.data.augmentation import Augment, auto_augment
from distil_tl.data.config import DataConfig, default_workers
from distil_tl.data.index import Index
from distil_tl.data.loader import plan_batches
from distil_tl.data.pixels import refuse_changed_pixels
from distil_tl.data.proportions import crop_for, typical_ratio
from distil_tl.data.splits import Splits
from distil_tl.data.transforms import eval_transform
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import Launch
from distil_tl.doctor import machine, space
from distil_tl.doctor.facts import Facts
from distil_tl.doctor.folders import archive_size
from distil_tl.doctor.images import ImagesFound, look_at_images, stage_folder
from distil_tl.doctor.lines import Report, counted, guarded
from distil_tl.doctor.slurm import GROUP as SLURM
from distil_tl.doctor.wandb import judge_wandb
from distil_tl.doctor.weights import ModelFound, judge_weights, look_at_model
from distil_tl.models.config import ModelConfig
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.transfer import default_preprocess
from distil_tl.rundir.opening import look_for_start
from distil_tl.training.config import COMPILE
from distil_tl.utils.auto import AUTO
from distil_tl.utils.home import cache_dir

GROUP = "configuration"
ALL_SECONDS = 80_000.0  # to decode all images; less than the day after which the command ends
SCAN_SECONDS = 900.0  # a scan of ten million images on a network file system takes minutes
DEFAULT_IMAGE_SIZE = 224


@dataclass
class Plan:
    """The run to examine.

    Attributes:
        config: that of the demo where the arguments can't be read; a value that can't be read is the default.
        unresolved: None where the arguments can't be read.
        slurm: the section `slurm`, launch's SlurmConfig; None if there is none.
        problems: of the configuration.
        unread: the problems of arguments that can't be read.
        failed: what could not be found out, and why.
        decode_all: whether all images are decoded, or a few.
    """

    launch: Launch
    title: str
    config: Config
    unresolved: DictConfig | None
    slurm: Any | None
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    decode_all: bool = False

    @property
    def is_submission(self) -> bool:
        """Whether the run will be submitted to Slurm from this machine, which then need not have GPUs."""
        return self.slurm is not None and self.launch.launcher == "none"

    @property
    def world_size(self) -> int:
        """The number of ranks of the run."""
        if self.slurm is None or not self.is_submission or list(self.slurm.problems()):
            return self.launch.world_size
        size: int = self.slurm.world_size
        return size

    @property
    def distributed(self) -> DistributedConfig:
        """The section `distributed`, with the device left open where another machine decides."""
        section = self.config.distributed
        if not self.is_submission or section.device == "cpu":
            return section
        return dataclasses.replace(section, device="auto", backend="gloo" if section.backend == "gloo" else "auto")

    @functools.cached_property
    def model(self) -> ModelConfig | None:
        """The section `model`; None if it is not valid."""
        return None if self.unresolved is None or self.config.model.problems() else self.config.model

    @functools.cached_property
    def preprocess(self) -> Preprocess | None:
        if self.model is None:
            return None
        found, data = default_preprocess(self.model), self.data
        return found if data is None else found.with_crop(data.crop_mode, data.crop_pct)

    @property
    def image_size(self) -> int:
        default = DEFAULT_IMAGE_SIZE if self.preprocess is None else self.preprocess.crop_size
        return self.config.data.image_size or default

    @property
    def data(self) -> DataConfig | None:
        """The section `data`; None if it is not valid."""
        return None if self.unresolved is None or self.config.data.problems() else self.config.data

    def folders(self) -> dict[str, tuple[str, bool]]:
        """The folders to look at on each rank: path, and whether they are written to. Nothing is read for this."""
        data, found = self.config.data, dict[str, tuple[str, bool]]()
        assert self.config.run_dir is not None
        if self.unresolved is not None:
            found["run_dir"] = (self.config.run_dir, True)
        found["cache"] = (str(cache_dir()), True)
        if data.root is not None:
            found["data.root"] = (data.root, False)
        folder, _ = stage_folder(data.stage_to)
        if folder is not None and not self.is_submission:  # it is on the disk of each node
            found["data.stage_to"] = (folder, True)
        return found

    def needs_folder(self, name: str, archive: int | None) -> bool:
        """Whether the run can't do without a folder. `archive`: bytes of the tar file of images, if there is one."""
        return (
            name in ("run_dir", "data.root")
            or (name == "cache" and self.config.data.root is None)
            or (name == "data.stage_to" and archive is not None)
        )

    def judge_machine(self, report: Report, everyone: Sequence[Facts]) -> None:
        """Lines about what the machine has, against what the loader processes need."""
        data, needs = self.config.data, {}
        for each in everyone:
            workers = default_workers(each.cpus) if data.workers is None else data.workers
            needs[each.rank] = machine.loading(data, workers, self.launch.world_size, self.image_size)
        machine.judge_machine(report, everyone, data, needs)


def judge_plan(report: Report, plan: Plan, everyone: Sequence[Facts], seconds: float) -> None:
    """Rank 0: lines about configuration, data, model, disk, tracking, Slurm, and where the run would start."""
    images, sizes = ImagesFound(decode_all=plan.decode_all), list[ModelFound]()
    if plan.unresolved is not None:
        guarded(report, GROUP, "values", seconds, lambda found: judge_configuration(found, plan))
        min_side = None
        if plan.preprocess is not None:
            min_side = eval_transform(plan.preprocess, plan.image_size).min_side
        data, run_dir = plan.config.data, Path(plan.config.run_dir or "")
        guarded(
            report, "data", "images", ALL_SECONDS if plan.decode_all else SCAN_SECONDS,
            lambda found: look_at_images(found, data, min_side, images, run_dir),
        )  # fmt: skip
        guarded(report, GROUP, "auto", seconds, lambda found: judge_auto(found, plan, images))
    if plan.model is not None:
        guarded(report, "model", "model.name", seconds, lambda found: _judge_model(found, plan, images, sizes))
        model = plan.model
        guarded(report, "model", "model.weights", seconds, lambda found: judge_weights(found, model, everyone))
    guarded(report, "disk", "space", seconds, lambda found: _judge_space(found, plan, everyone, images, sizes))
    guarded(report, "tracking", "W&B", seconds, lambda found: judge_wandb(found, plan.config.tracking.wandb))
    if plan.slurm is not None:
        guarded(report, SLURM, "slurm", seconds, lambda found: judge_slurm(found, plan, everyone))
    if plan.unresolved is not None and not plan.problems and not plan.unread:
        guarded(report, "run", "start", seconds, lambda found: judge_start(found, plan, images.indexes))


def judge_configuration(report: Report, plan: Plan) -> None:
    """Lines about the values of the configuration, with those that are chosen by default."""
    config, world = plan.config, plan.world_size
    compile = "none" if plan.is_submission and config.compile in COMPILE else config.compile  # a node has the compiler
    checked = dataclasses.replace(config, distributed=plan.distributed, compile=compile)
    plan.problems = list(configuration.problems(checked, world))
    for problem in plan.problems:
        report.fail(GROUP, "values", problem)
    for hint in configuration.hints(config):
        report.warn(GROUP, "values", hint)
    if not plan.problems:
        report.ok(GROUP, "values", "valid" if not plan.unread else "those that can be read are valid")
        _judge_batch(report, config.data, world)
    _, unknown = stage_folder(config.data.stage_to)
    if plan.is_submission and config.data.stage_to is not None:
        report.ok(GROUP, "data.stage_to", "not looked at: it is on the disk of each node of the job")
    elif unknown is not None and Path(config.data.root or "").is_file():
        report.fail(GROUP, "data.stage_to", f"{unknown} on this machine, and data.root is a tar file, which must be "
                    f"unpacked there: set the variable, or another data.stage_to")  # fmt: skip
    elif unknown is not None:
        report.warn(GROUP, "data.stage_to", f"{unknown} on this machine; the images are read from data.root")


def _judge_batch(report: Report, data: DataConfig, world: int) -> None:
    if data.global_batch_size == AUTO:
        report.ok(GROUP, "batch", "auto: by the number of training images")
        return
    batch = plan_batches(data.global_batch_size, world, data.max_local_batch_size)
    report.ok(
        GROUP, "batch", f"{data.global_batch_size} images a step = {counted(world, 'rank')} x "
        f"{counted(batch.accumulation, 'micro-batch')} x {counted(batch.micro, 'image')}",
    )  # fmt: skip


def judge_auto(report: Report, plan: Plan, images: ImagesFound) -> None:
    """A line about what `auto` will be, where the images are known."""
    count = images.images.get("train", 0)
    if count == 0 or plan.problems:
        return
    _, found = resolve_auto(plan.config, count, {})
    index = images.indexes.get("train")
    data, shown = plan.config.data, dict[str, Any](found)
    mode = data.crop_mode
    if mode == AUTO:
        mode = "weights" if index is None else crop_for(typical_ratio(index))
        shown |= {} if mode == "weights" else {"data.crop_mode": mode}
    if data.augment == AUTO and plan.config.uses_data_augment and auto_augment(mode, hflip=data.hflip) == "flip":
        shown["data.augment"] = "flip"
    if problem := auto_problem(found, count, plan.world_size):
        report.fail(GROUP, "auto", problem)
    elif shown:
        report.ok(GROUP, "auto", describe_auto(shown, count))


def _augments(config: Config) -> dict[str, Augment]:
    return {name: config.augment_of(stage) for name, stage in config.stages.items()}


def _judge_model(report: Report, plan: Plan, images: ImagesFound, sizes: list[ModelFound]) -> None:
    data = plan.config.data
    sizes.append(
        look_at_model(
            report, plan.config.model, plan.config.stages,
            classes=images.classes or 2, image_size=data.image_size, augments=_augments(plan.config),
        )
    )  # fmt: skip


def _judge_space(
    report: Report, plan: Plan, everyone: Sequence[Facts], images: ImagesFound, sizes: Sequence[ModelFound]
) -> None:
    config, folders, archive = plan.config, everyone[0].folders, archive_size(everyone)
    if sizes and "run_dir" in folders:
        keep = config.checkpoint.keep
        space.judge_checkpoints(report, folders["run_dir"], sizes[0], config.optim, keep, config.stages)
    if sizes and "cache" in folders:
        space.judge_features(report, folders["cache"], sizes[0], images, config.stages, _augments(config))
    if "data.stage_to" in folders and config.data.root is not None and (images.bytes or archive is not None):
        space.judge_copy(report, folders["data.stage_to"], config.data.root, images, archive)


def judge_start(report: Report, plan: Plan, indexes: Mapping[str, Index]) -> None:
    """A line about where the run would start.

    Args:
        indexes: of the images, by split; empty if they are not known.

    Raises:
        UserError: training would refuse that.
    """
    assert plan.unresolved is not None
    start = look_for_start(dataclasses.asdict(plan.config), plan.unresolved)
    if start.completed:
        report.warn("run", "start", f"the run in {start.run_dir} is complete: there is nothing left to do")
        return
    if start.checkpoint is None or start.saved is None or start.saved_run_dir is None:
        report.ok("run", "start", f"it begins in {start.run_dir}")
        return
    refuse_changed_pixels(start.saved.get("pixels", {}), start.saved_run_dir)
    if indexes:
        splits = Splits(indexes["train"], indexes["val"], indexes.get("test"))
        splits.refuse_changed_images(start.saved["data"], start.saved_run_dir)
    unseen = "" if indexes else "; its images were not compared"
    report.ok("run", "start", f"it resumes from {start.checkpoint}{unseen}")
