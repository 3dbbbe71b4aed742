"""Loading the model of a run directory: weights, transform, class names, and refusals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distil_tl
from distil_tl.config import load_saved
from distil_tl.data.decode import decode
from distil_tl.data.transforms import eval_transform
from distil_tl.evaluate import main as evaluate
from distil_tl.inference import RestoredModel, Transform, restore_model
from distil_tl.models.config import ModelConfig
from distil_tl.models.preprocess import Normalize, Preprocess
from distil_tl.models.transfer import TransferModel, build
from distil_tl.rundir.checkpoint import Checkpoints
from distil_tl.train import main as train
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import head_args
from tests.helpers.runs import summary_of

CLASSES = ["circles", "noise", "stripes"]
NAME = "shufflenet_v2_x0_5"
PREPROCESS = Preprocess(mean=(0.5, 0.4, 0.3), crop_size=224, resize_size=448)


@pytest.fixture(scope="module")
def trained() -> TransferModel:
    return build(ModelConfig(NAME, weights="none"), len(CLASSES), image_size=64, seed=7)


@pytest.fixture(scope="module")
def run_dir(trained: TransferModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints that two stages would leave: `best` of step 1, `last` of step 2."""
    path: Path = tmp_path_factory.mktemp("run")
    (path / "config.yaml").write_text(
        f"data: {{root: null, image_size: 64}}\n"
        f"model: {{name: {NAME}, weights: gone.pth}}\n"  # only training needs the pretrained weights
        f"stages: {{head: {{unfreeze: head}}, full: {{unfreeze: all, image_size: 96}}}}\n"
    )
    checkpoints = Checkpoints(path / "checkpoints")
    for step, stage in enumerate(("head", "full"), 1):
        weights = {name: value + step for name, value in trained.module.state_dict().items()}
        run = {"position": {"stage": stage}, "stages": {stage: {"precision": "bf16 channels_last"}}}
        state = {"classes": CLASSES, "preprocess": asdict(PREPROCESS), "run": run}
        checkpoints.save(step, weights=weights, train_state={}, state=state, is_best=stage == "head")
    checkpoints.wait()
    return path


@pytest.mark.parametrize(("checkpoint", "step", "size"), [("best", 1, 64), ("last", 2, 96), ("step-00000002", 2, 96)])
def test_a_checkpoint_is_loaded_by_name(
    run_dir: Path, trained: TransferModel, checkpoint: str, step: int, size: int
) -> None:
    model, transform, classes = distil_tl.load(run_dir, checkpoint)
    assert classes == CLASSES
    assert not model.training
    for name, value in trained.module.state_dict().items():
        assert torch.equal(model.state_dict()[name], value + step), name
    assert transform.image_size == size, "the image size of the checkpoint's stage"
    assert model(transform(torch.zeros(3, 40, 50, dtype=torch.uint8))[None]).shape == (1, 3)


def test_the_crop_is_that_of_the_training_unless_another_one_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    args = head_args(folder, run_dir, "stages.head.epochs=1", "stages.full.epochs=0", "data.crop_mode=squash")
    assert train(args) == 0
    image = next((folder / "val").rglob("*.png"))  # 40 x 36 pixels
    preprocess = restore_model(run_dir).model.preprocess
    squashed, centre = (preprocess.with_crop(mode, None) for mode in ("squash", "center"))
    view = distil_tl.load(run_dir).transform.view(image)
    assert torch.equal(view, eval_transform(squashed, 32)(decode(image)))
    assert not torch.equal(view, eval_transform(centre, 32)(decode(image)))
    changed = restore_model(run_dir, overrides=["data.crop_mode=center"])
    assert torch.equal(changed.transform().view(image), eval_transform(centre, 32)(decode(image)))
    assert evaluate([str(run_dir), "--json", str(tmp_path / "found.json")]) == 0
    found, best = json.loads((tmp_path / "found.json").read_text()), summary_of(run_dir)["best"]
    assert [found[key] for key in ("top1", "loss")] == pytest.approx([best[key] for key in ("top1", "loss")])
    assert "overrides" not in found
    capsys.readouterr()
    assert evaluate([str(run_dir), "--json", str(tmp_path / "found.json"), "data.crop_mode=center"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["overrides"] == ["data.crop_mode=center"]
    assert "on val data.crop_mode=center: top-1" in capsys.readouterr().out


def test_a_path_an_image_and_a_tensor_give_the_same(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    transform = Transform(PREPROCESS, 32)
    view = transform.view(torch.from_numpy(pixels).permute(2, 0, 1))
    assert (view.dtype, view.shape) == (torch.uint8, (3, 32, 32))
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels)):
        assert torch.equal(transform.view(image), view)
        assert torch.equal(transform(image), Normalize(PREPROCESS)(view))


def test_every_clear_kind_of_image_is_understood(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour, grey = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8), rng.integers(0, 256, (50, 60), dtype=np.uint8)
    transform = Transform(PREPROCESS, 32)
    turned = np.asarray(np.rot90(colour), order="F")  # with strides that torch does not take
    for array in (colour, colour[:, ::-1], turned):
        assert torch.equal(transform(array), transform(Image.fromarray(np.ascontiguousarray(array))))
    expected = transform(Image.fromarray(grey))
    for same in (grey, grey[:, :, None], torch.from_numpy(grey)[None]):
        assert torch.equal(transform(same), expected)
    transparent = Image.fromarray(np.dstack([colour, np.zeros_like(grey)]))
    transparent.save(tmp_path / "image.png")
    assert torch.equal(transform(transparent), transform(tmp_path / "image.png")), "white, as in training"


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (torch.zeros(3, 40, 50), "a tensor of float32"),
        (np.zeros((40, 50, 3)), "an array of float64"),
        (np.zeros((40, 50), dtype=np.uint16), "an array of uint16"),
        (torch.zeros(40, 50, 3, dtype=torch.uint8), r"a tensor of the shape \[40, 50, 3\]"),
        (torch.zeros(40, 50, dtype=torch.uint8), r"a tensor of the shape \[40, 50\]"),
        (torch.zeros(2, 3, 40, 50, dtype=torch.uint8), r"a tensor of the shape \[2, 3, 40, 50\]"),
        (np.zeros((3, 40, 50), dtype=np.uint8), r"an array of the shape \[3, 40, 50\]"),
        (np.zeros((0, 50, 3), dtype=np.uint8), r"an array of the shape \[0, 50, 3\]"),
        (b"\xff\xd8", "an image of the type bytes"),
        (None, "an image of the type NoneType"),
        ([[0, 1], [2, 3]], "an image of the type list"),
    ],
)
def test_any_other_is_refused_with_what_to_give(image: object, what: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{what}.* is not understood: give a path, a PIL image, a"):
        Transform(PREPROCESS, 32)(image)  # type: ignore[arg-type]


def test_values_are_scaled_as_in_training(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {root: null, intensity: [0, 4095]}\n")
    Image.fromarray(np.full((40, 50), 4095, dtype=np.uint16)).save(tmp_path / "image.png")
    config = load_saved(tmp_path)
    model = build(ModelConfig(NAME, weights="none"), 3, image_size=64, seed=7)
    restored = RestoredModel(config, model, CLASSES, 64, tmp_path, "fp32")
    for image in (tmp_path / "image.png", Image.open(tmp_path / "image.png")):
        assert restored.transform().view(image).eq(255).all()


def test_the_preprocessing_is_that_of_the_checkpoint(run_dir: Path) -> None:
    assert restore_model(run_dir).model.preprocess == PREPROCESS


@pytest.mark.parametrize(("overrides", "precision"), [([], "bf16"), (["precision=fp32"], "fp32")])
def test_the_precision_is_the_configured_one_or_that_chosen_in_training(
    run_dir: Path, overrides: list[str], precision: str
) -> None:
    assert restore_model(run_dir, overrides=overrides).precision == precision


def test_a_folder_that_is_not_a_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: config\.yaml is missing"):
        distil_tl.load(tmp_path)


def test_a_missing_checkpoint_is_refused_with_the_names_of_the_existing_ones(run_dir: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint 'step-7'; existing: step-00000001, step-00000002"):
        distil_tl.load(run_dir, "step-7")


def test_a_damaged_checkpoint_is_refused(run_dir: Path, trained: TransferModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    checkpoints.save(1, weights=trained.module.state_dict(), train_state={}, state={}, is_best=True)
    checkpoints.wait()
    (checkpoints.path(1) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000001 is damaged: weights\.safetensors"):
        distil_tl.load(tmp_path)
