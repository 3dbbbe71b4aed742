"""Loading the trained model of a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from distil_tl.config import Config, load_saved
from distil_tl.data.decode import decode, to_tensor
from distil_tl.data.transforms import ImageTransform, eval_transform
from distil_tl.models.preprocess import Normalize, Preprocess
from distil_tl.models.transfer import TransferModel, build
from distil_tl.rundir import checkpoint as ckpt
from distil_tl.rundir.checkpoint import Checkpoints, find_damage
from distil_tl.utils.errors import UserError


class Transform:
    """The evaluation transform: from a path, PIL image or uint8 tensor [3, H, W] to a normalised float32 [3, S, S]."""

    def __init__(self, preprocess: Preprocess, image_size: int) -> None:
        self.image_size = image_size
        self._view: ImageTransform = eval_transform(preprocess, image_size)
        self._normalize = Normalize(preprocess)

    def __call__(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        normalized: Tensor = self._normalize(self.view(image))
        return normalized

    def view(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        """Resized and cropped, still uint8 [3, S, S]."""
        if isinstance(image, (str, Path)):
            image = decode(image, min_side=self._view.min_side)
        elif isinstance(image, Image.Image):
            image = to_tensor(image)
        view: Tensor = self._view(image)
        return view


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier: `model(transform(image)[None])` gives logits [1, C] in the order of `classes`.

    Unpacks as `model, transform, classes`.
    """

    model: nn.Module
    transform: Transform
    classes: list[str]

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
    """

    config: Config
    model: TransferModel
    classes: list[str]
    image_size: int
    checkpoint: Path
    precision: str


def load_trained(run_dir: str | Path, checkpoint: str = "best") -> TrainedModel:
    """The model of a run directory in evaluation mode on the CPU, its transform, and its class names.

    Args:
        run_dir: a run directory of `distil_tl.train`.
        checkpoint: `best`, `last`, or the name of a folder in RUN_DIR/checkpoints.

    Raises:
        UserError: the run or the checkpoint does not exist, or the checkpoint is damaged.
    """
    restored = restore_model(run_dir, checkpoint)
    transform = Transform(restored.model.preprocess, restored.image_size)
    return TrainedModel(restored.model.module.eval(), transform, restored.classes)


def restore_model(run_dir: str | Path, checkpoint: str = "best", overrides: list[str] | None = None) -> RestoredModel:
    """Rebuild the model of a checkpoint.

    Args:
        run_dir: a run directory of `distil_tl.train`.
        checkpoint: `best`, `last`, or the name of a folder in RUN_DIR/checkpoints.
        overrides: `key=value` arguments that change the run's configuration.

    Raises:
        UserError: the run or the checkpoint does not exist, the checkpoint is damaged, or an override is invalid.
    """
    run_dir = Path(run_dir)
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{run_dir} is not a run directory: config.yaml is missing")
    config = load_saved(run_dir, overrides or [])
    path = _find_checkpoint(run_dir, checkpoint)
    damage = find_damage(path)
    if damage is not None:
        raise UserError(f"the checkpoint {path} is damaged: {damage}")
    state = ckpt.load_state(path)
    classes: list[str] = state["classes"]
    preprocess = Preprocess.from_json(state["preprocess"])
    stage_name = state["run"]["position"]["stage"]
    stage = config.stages[stage_name]
    image_size = stage.image_size or config.data.image_size or preprocess.crop_size
    model = build(config.model, len(classes), image_size=config.data.image_size, seed=config.seed, pretrained=False)
    model.preprocess = preprocess
    ckpt.load_weights(path, model.module)
    chosen = state["run"]["stages"][stage_name].get("precision")  # such as "bf16 channels_last"
    precision = chosen.partition(" ")[0] if config.precision == "auto" and chosen else config.precision
    return RestoredModel(config, model, classes, image_size, path, precision)


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
