"""A picture of what a stage trains on: some images as augmented, in RUN_DIR/samples/STAGE.jpg."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distil_tl.data.mixed_batches import MixedDataset, mix, with_partners
from distil_tl.data.source import ImageSource
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.step import StageTraining
from distil_tl.utils.files import write_atomic
from distil_tl.utils.log import logger

COUNT, SIDE = 10, 96  # images, and their side in pixels


def write_samples(
    info: DistInfo, run_dir: Path, training: StageTraining, source: ImageSource, *, is_resumed: bool
) -> None:
    """Write the first images of the stage as its augmentation shows them, side by side; those that can be read.

    Args:
        is_resumed: the stage has begun before, so that a picture which is there shows it.
    """
    stage = training.stage
    path = run_dir / "samples" / f"{stage.name}.jpg"
    if not info.is_main or (is_resumed and path.exists()):
        return
    # An image has its own random numbers, so nothing else changes.
    dataset = source.train_dataset(
        "train", stage.image_size, stage.augment, seed=stage.seed, stage=stage.name, mixing=stage.mixing
    )
    keys = list(itertools.islice(training.sampler.keys(0), COUNT))
    try:
        if isinstance(dataset, MixedDataset):
            items = dataset.__getitems__(with_partners(training.sampler, keys))
            batch = mix(dataset.collate(items), stage.mixing)
        else:
            batch = dataset.collate([dataset[key] for key in keys])
    except (MemoryError, RuntimeError):  # training says so, with what to do
        return
    images = [_picture(image) for image in batch.images[batch.valid]]
    if not images:
        return
    strip = Image.new("RGB", (len(images) * (SIDE + 4) - 4, SIDE), "white")
    for i, image in enumerate(images):
        strip.paste(image, (i * (SIDE + 4), 0))
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=85)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content.getvalue())
    except OSError as error:  # the picture is optional
        logger.warning("can't write %s: %s", path, error.strerror or error)


def _picture(image: Tensor) -> Image.Image:
    pixels = image.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
