"""A check that all packages start from the same: pixels of some images of val, and the loss before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers.job import Job
from distil_tl.data.index import Index
from distil_tl.data.loader import ImageDataset
from distil_tl.data.sampler import SampleKey
from distil_tl.data.scan import scan
from distil_tl.data.transforms import eval_transform
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build
from distil_tl.training.network import ImageNetwork, lay_out
from distil_tl.training.precision import Compute
from distil_tl.utils.errors import UserError

IMAGES = 32
# Limits of the differences: mean pixel value, relative loss, and relative loss on equal pixels. Pixels differ, because
# Pillow rounds after each direction of a resize, and tensors are rounded once.
MEAN_PIXEL, LOSS, LOSS_GIVEN = 1.0, 2e-2, 1e-4


def our_view(job: Job) -> dict[str, Any]:
    """The start of distil_tl: names of images, their uint8 pixels [32, 3, S, S], their targets and the loss."""
    config = ModelConfig(name=f"timm/{job.model}", weights=job.weights)
    model = build(config, job.classes, image_size=job.image_size, seed=job.seed)
    index = scan(Path(job.root) / "val", classes=scan(Path(job.root) / "train").classes)
    chosen = sorted({round(i) for i in np.linspace(0, len(index) - 1, IMAGES)})
    dataset = ImageDataset(index, eval_transform(model.preprocess, job.image_size), job.image_size)
    batch = dataset.collate([dataset[SampleKey(i, 0, i)] for i in chosen])
    network = ImageNetwork(model, Compute(None, True), torch.device("cpu")).eval()
    lay_out(network)
    with torch.no_grad():
        loss = F.cross_entropy(network(batch.images), batch.targets).item()
    return {"names": _names(index, chosen), "pixels": batch.images, "targets": batch.targets, "loss": loss}


def _names(index: Index, chosen: list[int]) -> list[str]:
    return [index.relative_path(i) for i in chosen]


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    difference = (theirs["pixels"] - ours["pixels"].float()).abs()
    return {
        "mean_pixel_difference": difference.mean().item(),
        "largest_pixel_difference": difference.max().item(),
        "same_targets": bool((theirs["targets"] == ours["targets"]).all()),
        "loss": theirs["loss"],
        "loss_on_our_pixels": theirs["loss_given"],
        "our_loss": ours["loss"],
    }


def refuse_unequal(name: str, parity: dict[str, Any]) -> None:
    """Refuse a peer that would not do the same work.

    Raises:
        UserError: with all differences that are too large.
    """
    problems = []
    if not parity["same_targets"]:
        problems.append("its classes are in another order")
    if parity["mean_pixel_difference"] > MEAN_PIXEL:
        problems.append(f"its pixels differ by {parity['mean_pixel_difference']:.2f} of 255 on average")
    our_loss = parity["our_loss"]
    if abs(parity["loss"] - our_loss) > LOSS * our_loss:
        problems.append(f"its first loss is {parity['loss']:.4f}, ours {our_loss:.4f}")
    if abs(parity["loss_on_our_pixels"] - our_loss) > LOSS_GIVEN * our_loss:
        problems.append(f"on the same pixels its loss is {parity['loss_on_our_pixels']:.6f}, ours {our_loss:.6f}")
    if problems:
        raise UserError(f"{name} would not do the same job: {'; '.join(problems)}. Leave it out with --peers, or try "
                        f"another --model")  # fmt: skip
