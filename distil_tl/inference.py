"""A finished run as a model to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from distil_tl.config import Config, load
from distil_tl.data.decode import decode, to_tensor
from distil_tl.data.transforms import View, eval_transform
from distil_tl.models.preprocess import Normalize, Preprocess
from distil_tl.models.transfer import TransferModel, build
from distil_tl.rundir import checkpoint as ckpt
from distil_tl.rundir.checkpoint import Checkpoints, find_fault
from distil_tl.utils.errors import UserError


class Transform:
    """What the model was evaluated with: an image file, PIL image or uint8 tensor [3, H, W] to float32 [3, S, S]."""

    def __init__(self, preprocess: Preprocess, image_size: int) -> None:
        self.image_size = image_size
        self._view: View = eval_transform(preprocess, image_size)
        self._normalize = Normalize(preprocess)

    def __call__(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        normalized: Tensor = self._normalize(self.view(image))
        return normalized

    def view(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        """Resized and cropped, still uint8 [3, S, S]."""
        if isinstance(image, (str, Path)):
            image = decode(image, enough=self._view.enough)
        elif isinstance(image, Image.Image):
            image = to_tensor(image)
        view: Tensor = self._view(image)
        return view


@dataclass(frozen=True)
class Trained:
    """A trained classifier: `model(transform(image)[None])` gives logits in the order of `classes`.

    Unpacks as `model, transform, classes`.
    """

    model: nn.Module
    transform: Transform
    classes: list[str]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter((self.model, self.transform, self.classes))


@dataclass(frozen=True)
class Restored:
    """A run's checkpoint with all that evaluating it takes."""

    config: Config
    model: TransferModel
    classes: list[str]
    image_size: int
    checkpoint: Path
    precision: str  # as configured, or what `auto` came to where it was trained


def load_trained(run_dir: str | Path, checkpoint: str = "best") -> Trained:
    """The model of a run directory in evaluation mode on the CPU, its transform, and its class names.

    Args:
        run_dir: what `distil_tl.train` wrote.
        checkpoint: `best`, `last`, or the name of a folder in RUN_DIR/checkpoints.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    restored = restore(run_dir, checkpoint)
    transform = Transform(restored.model.preprocess, restored.image_size)
    return Trained(restored.model.module.eval(), transform, restored.classes)


def restore(run_dir: str | Path, checkpoint: str = "best", overrides: list[str] | None = None) -> Restored:
    """Rebuild the model of a checkpoint; arguments and errors as `load_trained`.

    `overrides` are `key=value` on top of the run's own configuration.
    """
    run_dir = Path(run_dir)
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    config, _ = load([str(saved), *(overrides or [])])
    path = _find(run_dir, checkpoint)
    fault = find_fault(path)
    if fault is not None:
        raise UserError(f"the checkpoint {path} is damaged: {fault}")
    state = ckpt.load_state(path)
    classes: list[str] = state["classes"]
    preprocess = Preprocess.from_json(state["preprocess"])
    name = state["run"]["position"]["stage"]
    stage = config.stages[name]
    image_size = stage.image_size or config.data.image_size or preprocess.crop_size
    model = build(config.model, len(classes), image_size=config.data.image_size, seed=config.seed, pretrained=False)
    model.preprocess = preprocess
    ckpt.load_weights(path, model.module)
    trained_in = state["run"]["stages"][name].get("precision")
    precision = trained_in.partition(" ")[0] if config.precision == "auto" and trained_in else config.precision
    return Restored(config, model, classes, image_size, path, precision)


def _find(run_dir: Path, checkpoint: str) -> Path:
    checkpoints = Checkpoints(run_dir / "checkpoints")
    if checkpoint in ("best", "last"):
        path = checkpoints.named(checkpoint)
    else:
        path = run_dir / "checkpoints" / Path(checkpoint).name
    if path is None or not path.is_dir():
        have = ", ".join(p.name for p in checkpoints.all()) or "none"
        raise UserError(f"{run_dir} has no checkpoint {checkpoint!r} (it has: {have})")
    return path
