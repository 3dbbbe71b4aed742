"""Loading the trained model of a run directory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distil_tl.config import Config, load_saved
from distil_tl.data.decode import decode, to_tensor
from distil_tl.data.pillow import Intensity
from distil_tl.data.transforms import ImageTransform, eval_transform
from distil_tl.models.preprocess import Normalize, Preprocess
from distil_tl.models.transfer import TransferModel, build
from distil_tl.rundir import checkpoint as ckpt
from distil_tl.rundir.checkpoint import Checkpoints, find_damage
from distil_tl.rundir.state import StageRecord
from distil_tl.training.config import StageConfig
from distil_tl.training.heads.config import network_head
from distil_tl.training.network import Network, final_network
from distil_tl.training.precision import default_compute
from distil_tl.utils.auto import AUTO
from distil_tl.utils.errors import UserError
from distil_tl.utils.run_folders import refuse_other_than_run

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | Tensor | np.ndarray"
_ACCEPTED = (
    "give a path, a PIL image, a uint8 tensor [3, H, W] or [1, H, W], or a uint8 array [H, W, 3] or [H, W], with "
    "values 0 to 255: this transform scales and normalises them"
)


class Transform:
    """The evaluation transform: from an image to a normalised float32 [3, S, S], as the network saw it in training.

    An image is a path; a PIL image of any mode; a uint8 tensor [3, H, W], or [1, H, W] for grey; or a uint8 array as
    image libraries make it, [H, W, 3] in RGB, or [H, W] for grey.

    Args:
        intensity: as `data.intensity`, for 16-bit and float images.
    """

    def __init__(self, preprocess: Preprocess, image_size: int, intensity: Intensity = "dtype") -> None:
        self.image_size = image_size
        self.intensity = intensity
        self._view: ImageTransform = eval_transform(preprocess, image_size)
        self._normalize = Normalize(preprocess)

    def __call__(self, image: ImageLike) -> Tensor:
        normalized: Tensor = self._normalize(self.view(image))
        return normalized

    def view(self, image: ImageLike) -> Tensor:
        """Resized and cropped, still uint8 [3, S, S].

        Raises:
            TypeError, ValueError: it is none of the kinds of images that are understood.
            ImageError, OSError: as `decode`.
        """
        if isinstance(image, (str, os.PathLike)):
            pixels = decode(Path(image), min_side=self._view.min_side, intensity=self.intensity)
        elif isinstance(image, Image.Image):
            pixels = to_tensor(image, self.intensity)
        else:
            pixels = _pixels(image)
        view: Tensor = self._view(pixels)
        return view


def _pixels(image: object) -> Tensor:
    """A tensor or an array of pixels as uint8 [3, H, W]. What it may mean is never guessed from its values."""
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"an image of the type {type(image).__name__} is not understood: {_ACCEPTED}")
    kind = "a tensor" if isinstance(image, Tensor) else "an array"
    if image.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"{kind} of {str(image.dtype).removeprefix('torch.')} is not understood: {_ACCEPTED}")
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray):
        planes = image[:, :, None] if image.ndim == 2 else image
        channels = planes.shape[2] if planes.ndim == 3 else 0
        pixels = torch.from_numpy(np.ascontiguousarray(planes)) if channels in (1, 3) else None
        pixels = pixels.permute(2, 0, 1) if pixels is not None else None
    else:
        pixels = image if image.ndim == 3 and shape[0] in (1, 3) else None
    if pixels is None or 0 in shape:
        one = ", one image at a time" if len(shape) == 4 else ""
        raise ValueError(f"{kind} of the shape {list(shape)} is not understood: {_ACCEPTED}{one}")
    return pixels.expand(3, -1, -1)


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier: `model(transform(image)[None])` gives logits [1, C] in the order of `classes`.

    Unpacks as `model, transform, classes`.

    Attributes:
        temperature: `(logits / temperature).softmax(1)` are calibrated probabilities; 1 if none was fitted.
    """

    model: nn.Module
    transform: Transform
    classes: list[str]
    temperature: float = 1.0

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter((self.model, self.transform, self.classes))


@dataclass(frozen=True)
class RestoredModel:
    """The model of a checkpoint, and what its evaluation needs.

    Attributes:
        config: the configuration of the run.
        model: with the weights of the checkpoint, on the CPU.
        classes: names, in the order of the logits.
        image_size: side of the images in pixels in the stage of the checkpoint.
        checkpoint: its folder.
        precision: as configured; for `auto`, the precision chosen in training.
        stage: of the checkpoint.
        prefix_precision: of its frozen part, if it had one and the precision was chosen in training.
        temperature: divides the logits for calibrated probabilities; None if none was fitted.
    """

    config: Config
    model: TransferModel
    classes: list[str]
    image_size: int
    checkpoint: Path
    precision: str
    stage: StageConfig = field(default_factory=StageConfig)
    prefix_precision: str | None = None
    temperature: float | None = None

    def network(self, device: torch.device) -> Network:
        """The whole model in evaluation mode, on uint8 images, computed as while its stage trained."""
        compute, record = default_compute(self.precision, self.model.module, device), StageRecord()
        if self.prefix_precision is not None:
            record.prefix_precision = str(default_compute(self.prefix_precision, self.model.module, device))
        return final_network(self.model, self.stage, compute, record, device, self.image_size).eval()

    def transform(self) -> Transform:
        """From an image to the input of the model."""
        return Transform(self.model.preprocess, self.image_size, self.config.data.intensity)


def load_trained(run_dir: str | Path, checkpoint: str = "best", *, allow_own: bool = False) -> TrainedModel:
    """The model of a run directory in evaluation mode on the CPU, its transform, and its class names.

    Args:
        run_dir: a run directory of `distil_tl.train`.
        checkpoint: `best`, `last`, or the name of a folder in RUN_DIR/checkpoints.
        allow_own: as in `restore_model`.

    Raises:
        UserError: the run or the checkpoint does not exist, or the checkpoint is damaged.
    """
    restored = restore_model(run_dir, checkpoint, allow_own=allow_own)
    transform = restored.transform()
    return TrainedModel(restored.model.module.eval(), transform, restored.classes, restored.temperature or 1.0)


def restore_model(
    run_dir: str | Path, checkpoint: str = "best", overrides: list[str] | None = None, *, allow_own: bool = False
) -> RestoredModel:
    """Rebuild the model of a checkpoint.

    Args:
        run_dir: a run directory of `distil_tl.train`.
        checkpoint: `best`, `last`, or the name of a folder in RUN_DIR/checkpoints.
        overrides: `key=value` arguments that change the run's configuration.
        allow_own: whether the run may name a network of its author, whose code is imported and run.

    Raises:
        UserError: the run or the checkpoint does not exist, the checkpoint is damaged, an override is invalid, or the
            run names code that the caller has not allowed.
    """
    run_dir = Path(run_dir)
    saved = run_dir / "config.yaml"
    refuse_other_than_run(run_dir)
    config = load_saved(run_dir, overrides or [], allow_own=allow_own)
    path = _find_checkpoint(run_dir, checkpoint)
    damage = find_damage(path)
    if damage is not None:
        raise UserError(f"the checkpoint {path} is damaged: {damage}")
    state = ckpt.load_state(path)
    classes: list[str] = state["classes"]
    preprocess = Preprocess.from_json(state["preprocess"])
    stage_name = state["run"]["position"]["stage"]
    if stage_name not in config.stages:
        raise UserError(
            f"{saved} has no stage {stage_name}, which the checkpoint {path.name} is of: it was changed; restore it"
        )
    stage = config.stages[stage_name]
    image_size = stage.image_size or config.data.image_size or preprocess.crop_size
    model = build(
        config.model, len(classes), image_size=config.data.image_size, seed=config.seed, pretrained=False,
        head_kind=network_head(config.stages),
    )  # fmt: skip
    if any(argument.startswith("data.crop_") for argument in overrides or ()):
        mode = config.data.crop_mode
        if mode == AUTO:
            mode = state["run"].get("resolved", {}).get("data.crop_mode", "weights")
        preprocess = preprocess.with_crop(mode, config.data.crop_pct)
    model.preprocess = preprocess
    ckpt.load_weights(path, model.module)
    record = state["run"]["stages"][stage_name]
    chosen = record.get("precision")  # such as "bf16 channels_last"
    precision = chosen.partition(" ")[0] if config.precision == "auto" and chosen else config.precision
    prefix = (record.get("prefix_precision") or "").partition(" ")[0] if config.precision == "auto" else None
    temperature = ckpt.load_temperature(path)
    return RestoredModel(config, model, classes, image_size, path, precision, stage, prefix or None, temperature)


def _find_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    checkpoints = Checkpoints(run_dir / "checkpoints")
    if checkpoint in ("best", "last"):
        path = checkpoints.named(checkpoint)
    else:
        path = run_dir / "checkpoints" / Path(checkpoint).name
    if path is None or not path.is_dir():
        existing = ", ".join(p.name for p in checkpoints.all()) or "none"
        raise UserError(f"{run_dir} has no checkpoint {checkpoint!r}; existing: {existing}")
    return path
