"""Disk space: whether there is enough for what a run will write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distil_tl.data.augmentation import Augment
from distil_tl.data.config import data_name
from distil_tl.data.local_folder import FREE_SPACE_FACTOR
from distil_tl.doctor.lines import FAIL, WARN, Report, size
from distil_tl.training.config import OptimConfig, StageConfig, wants_features

if TYPE_CHECKING:
    from distil_tl.doctor.folders import FolderFacts
    from distil_tl.doctor.images import ImagesFound
    from distil_tl.doctor.weights import ModelFound

GROUP = "disk"
OPTIMIZER_VALUES = {"adamw": 2, "sgd": 1}  # per trained parameter


def judge_checkpoints(
    report: Report,
    run_dir: FolderFacts,
    model: ModelFound,
    optim: OptimConfig,
    keep: int,
    stages: Mapping[str, StageConfig],
) -> None:
    """A line about the space for checkpoints: the newest ones, the best one, and the one that is being written."""
    values = OPTIMIZER_VALUES.get(optim.name, 2) + max((saved_weights(stage) for stage in stages.values()), default=0)
    one = 4 * (model.parameters + values * model.trainable)
    needed, written = (keep + 2) * one, _size_of(Path(run_dir.path) / "checkpoints")
    more = size(max(0, needed - written))
    text = f"{size(run_dir.free)} free for {more}: up to {keep + 2} checkpoints of up to {size(one)}"
    if run_dir.free + written >= needed:
        report.ok(GROUP, "checkpoints", text)
    else:
        report.fail(GROUP, "checkpoints", f"{text}; free some space, choose another run_dir, or lower checkpoint.keep")


def saved_weights(stage: StageConfig) -> int:
    """How many values of each trained parameter a checkpoint has besides the evaluated one."""
    return int(stage.ema is not None) + 2 * stage.wise_ft


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("step-*/*") if path.is_file())


def judge_features(
    report: Report,
    cache: FolderFacts,
    model: ModelFound,
    images: ImagesFound,
    stages: Mapping[str, StageConfig],
    augments: Mapping[str, Augment],
) -> None:
    """A line about the space for cached features of the stages that train the head alone; others need more.

    Args:
        augments: the augmentation of each stage.
    """
    for name, stage in stages.items():
        wanted = stage.epochs != 0 and wants_features(stage, augments[name])
        if not wanted or stage.unfreeze not in ("head", 1) or not images.images:
            continue
        count = images.images.get("train", 0) * (stage.views or 1) + images.images.get("val", 0)
        needed = 4 * count * model.head_width
        text = f"{size(cache.free)} free for {size(needed)} of features in {cache.path}/features"
        if cache.free >= needed:
            report.ok(GROUP, f"stages.{name}", text)
            continue
        must = stage.features == "on" or stage.views is not None or stage.search.wanted or stage.fits_head
        report.add(
            GROUP, f"stages.{name}", FAIL if must else WARN, f"{text}; free some space or set DISTIL_TL_CACHE, "
            f"{'or' if must else 'else the frozen part runs in each epoch;'} set stages.{name}.features=off",
        )  # fmt: skip


def judge_copy(report: Report, folder: FolderFacts, root: str, images: ImagesFound, archive: int | None) -> None:
    """A line about the space for a copy of the images on this node.

    Args:
        archive: bytes of the tar file `root`, which training can't do without unpacking; None if it is a folder.
    """
    needed = images.bytes if archive is None else archive
    what = "images" if archive is None else "a tar file, and its images may need more,"
    text = f"{size(folder.free)} free for {size(needed)} of {what} in {folder.path}"
    if folder.free >= FREE_SPACE_FACTOR * needed:
        report.ok(GROUP, "data.stage_to", text)
    elif archive is None:
        report.warn(GROUP, "data.stage_to", f"{text}: the images will be read from {root} instead")
    elif any(Path(folder.path).glob(f"{data_name(Path(root))}-*/ready")):
        report.warn(GROUP, "data.stage_to", f"{text}: enough only if what is unpacked there is of this tar file")
    else:
        report.fail(GROUP, "data.stage_to", f"{text}: free some space, or choose another data.stage_to")
