"""Settings that are `auto`, or epochs within `max_minutes`: resolved once, recorded, and kept on resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distil_tl.data.augmentation import auto_augment
from distil_tl.data.config import auto_batch_size
from distil_tl.data.index import Index
from distil_tl.data.proportions import crop_for, typical_ratio
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.rundir.state import planned
from distil_tl.training.auto_rules import auto_epochs
from distil_tl.utils.auto import AUTO
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger

if TYPE_CHECKING:
    from distil_tl.config import Config
    from distil_tl.training.config import StageConfig


def resolve_auto(config: Config, images: int, state: Mapping[str, Any]) -> tuple[Config, dict[str, int]]:
    """The configuration with numbers in place of `auto`, and these numbers by key.

    They depend on the number of images alone, not on the number of ranks. A stage that has begun keeps its epochs,
    also those that `max_minutes` made of them.

    Args:
        images: of train.
        state: of the run that is resumed, as in state.json; empty if there is none.
    """
    found: dict[str, int] = {}
    saved, begun, data = state.get("resolved", {}), state.get("stages", {}), config.data
    if data.global_batch_size == AUTO:
        key = "data.global_batch_size"
        found[key] = saved.get(key, auto_batch_size(images))
        data = dataclasses.replace(data, global_batch_size=found[key])
    stages = dict(config.stages)
    for name, stage in config.stages.items():
        epochs = planned(name, stage.epochs, saved, begun=name in begun)
        if stage.fits_head and epochs != 0:
            epochs = 1  # a fit counts as one
        if epochs == AUTO:
            epochs = auto_epochs(max(1, images // data.global_batch_size))
        if epochs != stage.epochs:
            found[f"stages.{name}.epochs"] = epochs
            stages[name] = dataclasses.replace(stage, epochs=epochs)
    return dataclasses.replace(config, data=data, stages=stages), found


def describe_auto(found: Mapping[str, Any], images: int) -> str:
    """The numbers, in words."""
    return f"{', '.join(f'{key}={value}' for key, value in found.items())} ({images:,} training images)"


def auto_problem(found: Mapping[str, int], images: int, world_size: int) -> str | None:
    """Why the numbers don't fit the number of ranks; None if they do."""
    batch = found.get("data.global_batch_size", world_size)
    if batch % world_size == 0:
        return None
    return (
        f"data.global_batch_size=auto is {batch} for {images:,} training images, and can't be divided evenly among "
        f"{world_size} processes: start a power of two of at most {batch}, or give a number in place of auto"
    )


def settle(info: DistInfo, config: Config, train: Index, state: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """`settle_auto`, then `settle_views`, with what both found. A collective; raises as the first one."""
    config, numbers = settle_auto(config, len(train), state, info.world_size)
    config, views = settle_views(info, config, train, state)
    return config, {**numbers, **views}


def settle_auto(
    config: Config, images: int, state: Mapping[str, Any], world_size: int
) -> tuple[Config, dict[str, int]]:
    """`resolve_auto`, with a line that says what was chosen.

    Raises:
        UserError: on all ranks alike, the ranks can't divide the global batch.
    """
    config, found = resolve_auto(config, images, state)
    if problem := auto_problem(found, images, world_size):
        raise UserError(problem)
    shown = {key: value for key, value in found.items() if not _is_fit(config, key)}
    if shown:
        logger.info("auto: %s", describe_auto(shown, images))
    for name, stage in config.stages.items():
        if name not in state.get("stages", {}):
            warn_if_nothing_is_mixed(name, stage)
    return config, found


def settle_views(
    info: DistInfo, config: Config, train: Index, state: Mapping[str, Any]
) -> tuple[Config, dict[str, str]]:
    """The configuration with values in place of `auto` for `data.crop_mode` and `data.augment`, and these by key.

    They depend on the proportions of the training images, which rank 0 looks at. A run that is resumed keeps its own.
    A collective.

    Args:
        state: of the run that is resumed, as in state.json; empty if there is none.
    """
    data, saved, found = config.data, state.get("resolved", {}), dict[str, str]()
    if data.crop_mode == AUTO:
        key = "data.crop_mode"
        found[key] = saved[key] if key in saved else _crop(info, train)
        data = dataclasses.replace(data, crop_mode=found[key])
    if data.augment == AUTO and config.uses_data_augment:
        key = "data.augment"
        found[key] = saved[key] if key in saved else auto_augment(data.crop_mode, hflip=data.hflip)
        data = dataclasses.replace(data, augment=found[key])
        if found[key] == "flip" and key not in saved:
            logger.info("auto: %s=flip, without random crops, as data.crop_mode=%s", key, data.crop_mode)
    return dataclasses.replace(config, data=data), found


def _crop(info: DistInfo, train: Index) -> str:
    """The mode by the proportions of the images, with a line that says why it is another one than `weights`."""
    ratio = on_rank_zero(info, "looking at the images", lambda: typical_ratio(train))
    mode = crop_for(ratio)
    if ratio is None:
        logger.warning("auto: data.crop_mode=%s, as no image that was looked at has a readable header", mode)
    elif mode != "weights":
        logger.info(
            "auto: data.crop_mode=%s, as the longer side of the training images is %.2f times the shorter one; "
            "data.crop_mode=weights cuts out their centre", mode, ratio,
        )  # fmt: skip
    return mode


def _is_fit(config: Config, key: str) -> bool:
    """Whether a key is the epochs of a stage that fits its head."""
    return any(stage.fits_head and key == f"stages.{name}.epochs" for name, stage in config.stages.items())


def warn_if_nothing_is_mixed(name: str, stage: StageConfig) -> None:
    """Warn if a stage is set to mix images, and all of its epochs are among the last ones, in which none are mixed."""
    if stage.mixes_in_no_epoch:
        logger.warning(
            "stages.%s mixes no images: it has %d epochs, and stages.%s.mix_off_epochs=%d; set a smaller one",
            name, stage.epochs, name, stage.mix_off_epochs,
        )  # fmt: skip
