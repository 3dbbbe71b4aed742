"""Distillation: the formula, the order of classes, image sizes, caching, and whole runs."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from distil_tl.cli.distil import main as distil
from distil_tl.cli.distil import student
from distil_tl.config import load, problems
from distil_tl.data.loader import Batch
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build
from distil_tl.teacher import refuse_unfit_teachers, split_of_teacher
from distil_tl.train import main
from distil_tl.training.config import DistillConfig
from distil_tl.training.distillation import Teacher, Teaching, soft_losses
from distil_tl.training.losses import Loss
from distil_tl.training.network import Network
from distil_tl.training.precision import Compute
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import SMALLEST, small_args
from tests.helpers.images import make_folder
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import refused, same_result, stopped_train, summary_of


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_formula_of_the_paper(temperature: float) -> None:
    torch.manual_seed(0)
    logits, taught = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    p, q = (taught / temperature).softmax(1), (logits / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum(1)
    found = soft_losses(logits, taught, temperature)
    torch.testing.assert_close(found, by_hand)
    reference = F.kl_div(q.log(), p, reduction="batchmean") * temperature**2
    torch.testing.assert_close(found.mean(), reference)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(slope, temperature * (q - p))  # Hinton et al., section 2, times T^2


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    logits = torch.randn(4, 3)
    torch.testing.assert_close(soft_losses(logits, logits, 2.0), torch.zeros(4), atol=1e-6, rtol=0)


def batch(images: Tensor) -> Batch:
    count = len(images)
    return Batch(images, torch.arange(count) % 3, torch.arange(count), torch.ones(count, dtype=torch.bool), [])


class Means(Network):
    """Logits that are multiples of the mean of an image."""

    def __init__(self) -> None:
        super().__init__(Compute(None, False))
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(images.shape[-1])
        return images.float().mean((1, 2, 3))[:, None] * torch.tensor([1.0, 2.0, 3.0])


def test_the_loss_is_shared_and_weights_count_for_both_parts() -> None:
    part, logits = batch(torch.zeros(6, 3, 8, 8, dtype=torch.uint8)), torch.randn(6, 3)
    taught = torch.randn(6, 3)
    weights = torch.tensor([1.0, 2.0, 3.0])
    loss = Loss(weights=weights)
    teaching = Teaching(Teacher(model(), Means(), 8, [0, 1, 2]), DistillConfig("run", 3.0, 0.25))
    found = teaching.blend(loss(logits, part.targets, part.indices), logits, taught, part, loss)
    soft = soft_losses(logits, taught, 3.0)
    hard = F.cross_entropy(logits, part.targets, reduction="none")
    torch.testing.assert_close(found, (0.25 * soft + 0.75 * hard) * weights[part.targets])


def model() -> Any:
    return type("Model", (), {"module": nn.Linear(2, 2), "preprocess": None})()


def test_a_teacher_maps_classes_resizes_images_and_stays_in_evaluation_mode() -> None:
    network = Means()
    teacher = Teacher(model(), network, 8, [2, 0, 1]).train()
    assert not network.training
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    logits = teacher(images)
    torch.testing.assert_close(logits / logits[:, 1:2], torch.tensor([[3.0, 1.0, 2.0]]).expand(4, 3))
    assert not logits.requires_grad
    teacher(images[:, :, :8, :8])
    assert network.sizes == [8, 8]
    other = Teacher(model(), network, 8, [0, 1, 2])
    assert teacher.digest != other.digest


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("temperature=0", "stages.full.distill.temperature must be a positive number"),
        ("alpha=1.5", "stages.full.distill.alpha must be from 0"),
        ("teacher=nowhere", "stages.full.distill.teacher=nowhere is not a run directory"),
        ("teacher=nowhere.pth", "stages.full.distill.teacher: there is no file nowhere.pth"),
        ("teacher=~no_such/x", "stages.full.distill.teacher=~no_such/x: there is no user no_such"),
        ("model=timm/test_vit", "stages.full.distill.model is of a teacher: set stages.full.distill.teacher"),
        ("image_size=32", "stages.full.distill.image_size is of a teacher"),
    ],
)
def test_what_is_refused_before_any_work(arg: str, said: str) -> None:
    config, _ = load(["model.name=resnet18", "model.weights=none", f"stages.full.distill.{arg}"])
    (problem,) = problems(config, 1)
    assert problem.startswith(said)


def teacher_problems(*args: str) -> list[str]:
    config, _ = load(["model.name=resnet18", "model.weights=none", *(f"stages.full.distill.{arg}" for arg in args)])
    return list(problems(config, 1))


def test_weights_need_the_name_of_a_network_and_a_known_ending(tmp_path: Path) -> None:
    path, other = tmp_path / "x.pth", tmp_path / "x.ckpt"
    path.touch()
    other.touch()
    assert "name the network of these weights" in teacher_problems(f"teacher={path}")[0]
    assert not teacher_problems(f"teacher={path}", "model=resnet18", "image_size=64")
    assert "does not end in .safetensors, .pth" in teacher_problems(f"teacher={other}", "model=resnet18")[0]
    (problem,) = teacher_problems(f"teacher={path}", "model=resnet81")
    assert problem.startswith("stages.full.distill.model=resnet81 is not a torchvision classifier")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is not a regular file" in teacher_problems(f"teacher={tmp_path}/pipe.pth", "model=resnet18")[0]


# Whole runs.


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another image size than the students of these tests."""
    run_dir = tmp_path_factory.mktemp("teachers") / "teacher"
    args = [*small_args(folder), "data.image_size=48", "stages.full.epochs=1", f"run_dir={run_dir}"]
    assert run_ranks(1, train, args) == [0]
    return run_dir


def taught_args(small: list[str], teacher: Path, run_dir: Path) -> list[str]:
    names = ("head", "full")
    return [*small, *(f"stages.{name}.distill.teacher={teacher}" for name in names), f"run_dir={run_dir}"]


def test_a_student_on_one_and_two_ranks_and_stopped(teacher: Path, small: list[str], tmp_path: Path) -> None:
    small = [*small, "stages.full.epochs=1"]
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    assert run_ranks(1, train, taught_args(small, teacher, one)) == [0]
    assert run_ranks(2, train, taught_args(small, teacher, two)) == [0, 0]
    assert run_ranks(2, stopped_train, taught_args(small, teacher, again), 9, 1, signal.SIGTERM) == [3, 3]
    assert run_ranks(2, train, taught_args(small, teacher, again)) == [0, 0]
    same_result(again, two)
    losses = [[line["loss"] for line in lines(path, split="train", window="interval")] for path in (one, two)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    recorded = summary_of(two)["stages"]["full"]["teacher"]
    assert recorded["run_dir"] == str(teacher)
    assert recorded["digest"] == summary_of(one)["stages"]["head"]["teacher"]["digest"]


def recorded_losses(args: list[str]) -> list[list[float]]:
    """The training losses of a run, and those that torch computes of the same outputs; in this process."""
    found: list[list[float]] = []
    teaching: Any = importlib.import_module("distil_tl.training.distillation").Teaching
    original = teaching.blend

    def blend(self: Any, losses: Tensor, logits: Tensor, taught: Tensor, part: Batch, loss: Loss) -> Tensor:
        values: Tensor = original(self, losses, logits, taught, part, loss)
        soft = F.kl_div((logits / 2).log_softmax(1), (taught / 2).softmax(1), reduction="batchmean")
        reference = 0.5 * 4 * soft + 0.5 * F.cross_entropy(logits, part.targets)
        found.append([float(values.detach().mean()), float(reference.detach())])
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "blend", blend)
        assert train(args) == 0
    return found


def test_a_stage_on_features_learns_the_same_from_cached_outputs(
    teacher: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    base = [*taught_args(small, teacher, tmp_path / "run"), "stages.full.epochs=0", "stages.head.epochs=2"]
    base.append("data.augment=none")
    cached = recorded_losses(base)
    live = recorded_losses([*base, "stages.head.features=off", f"run_dir={tmp_path}/live"])
    assert summary_of(tmp_path / "run")["stages"]["head"]["cached"] is True
    assert summary_of(tmp_path / "live")["stages"]["head"]["cached"] is False
    assert len(cached) == 12
    np.testing.assert_allclose(cached, live, rtol=1e-3)
    values = np.array(cached)
    np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-5)
    views = [*base, "data.augment=light", "stages.head.views=2", f"run_dir={tmp_path}/views"]
    assert recorded_losses(views) != cached
    assert run_ranks(2, train, [*views, f"run_dir={tmp_path}/ranks"]) == [0, 0]
    figures = [[line["loss"] for line in lines(tmp_path / name, split="val")] for name in ("views", "ranks")]
    np.testing.assert_allclose(figures[0], figures[1], rtol=1e-4)


def test_another_teacher_is_refused_on_resume(
    teacher: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy, symlinks=True)
    args = taught_args(small, copy, tmp_path / "run")
    assert run_ranks(1, stopped_train, args, 3, 0, signal.SIGTERM) == [3]
    best = copy / "checkpoints" / "best"
    other = next(path for path in (copy / "checkpoints").glob("step-*") if path.name != best.readlink().name)
    best.unlink()
    best.symlink_to(other.name)
    assert "is not the model that this stage began with" in refused(args, capsys)


def test_other_classes_are_refused_and_another_order_is_mapped(
    teacher: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_folder(tmp_path / "other", {"train": 12, "val": 6}, ("circles", "stripes", "zebras"))
    args = taught_args([f"data.root={other}", *small[1:]], teacher, tmp_path / "run")
    message = refused(args, capsys)
    assert "it does not know zebras, and it knows noise besides" in message
    assert message.count("zebras") == 2, "of each stage"
    config, _ = load(args)
    with pytest.raises(UserError, match="zebras"):
        refuse_unfit_teachers(config, ["zebras", "stripes", "circles"])
    refuse_unfit_teachers(config, ["stripes", "noise", "circles"])


def file_args(small: list[str], file: Path, run_dir: Path) -> list[str]:
    """Both stages learn from weights."""
    keys = (f"teacher={file}", f"model={SMALLEST}", "image_size=48")
    return [
        *small,
        *(f"stages.{name}.distill.{key}" for name in ("head", "full") for key in keys),
        f"run_dir={run_dir}",
    ]


def test_weights_teach_what_the_run_they_are_of_teaches(
    teacher: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one rank and two, from the cache and in each step, stopped and resumed."""
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    small = [*small, "data.augment=none"]  # so that the first stage trains on features
    run, one, again = (tmp_path / name for name in ("run", "one", "again"))
    file = tmp_path / "teacher.pth"
    torch.save({"state_dict": load_file(teacher / "checkpoints/best/weights.safetensors")}, file)
    assert run_ranks(2, train, taught_args(small, teacher, run)) == [0, 0]
    args = file_args(small, file, again)
    assert run_ranks(2, stopped_train, args, 9, 1, signal.SIGTERM) == [3, 3]
    assert run_ranks(2, train, args) == [0, 0]
    same_result(again, run)
    recorded = summary_of(again)["stages"]
    assert recorded["head"]["cached"] is True
    expected = {
        "weights": str(file),
        "model": SMALLEST,
        "digest": summary_of(run)["stages"]["full"]["teacher"]["digest"],
    }
    assert recorded["full"]["teacher"] == expected

    args = file_args(small, file, one)
    assert run_ranks(1, stopped_train, args, 3, 0, signal.SIGTERM) == [3]
    state = torch.load(file)
    state["state_dict"]["fc.bias"] += 1
    torch.save(state, file)
    assert "is not the model that this stage began with (another file then, teacher.pth now)" in refused(args, capsys)


def test_weights_of_other_classes_are_refused_before_the_training(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build(ModelConfig(SMALLEST, "none"), 4, image_size=32, seed=0).module.state_dict()
    torch.save(state, tmp_path / "four.pth")
    args = file_args(small, tmp_path / "four.pth", tmp_path / "run")
    message = refused(args, capsys)
    assert message.count("four.pth has 4 outputs, and there are 3 classes") == 2
    torch.save({"model": state, "classes": ["circles", "noise", "stripes", "zebras"]}, tmp_path / "four.pth")
    assert "it knows zebras besides" in refused(args, capsys)
    assert not (tmp_path / "run").exists()


# The command.


def test_the_command_trains_another_model_with_the_images_and_split_of_the_teacher(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "teacher"
    shutil.copytree(folder / "train", tmp_path / "photos")
    args = [f"data.root={tmp_path}/photos", *small_args(folder)[1:], "stages.full.epochs=0", f"run_dir={first}"]
    assert main(args) == 0
    split = (first / "split.csv").read_text()
    moved = split.replace(",train,", ",val,", 1)  # so that it is not the split that would be made
    (first / "split.csv").write_text(moved)
    model = ["model.name=timm/test_vit", "model.weights=none", "data.image_size=32"]
    config, _ = load([*args, f"stages.head.distill.teacher={first}", f"run_dir={tmp_path}/x"])
    assert split_of_teacher(config) == first
    assert distil([str(first), *model, f"run_dir={tmp_path}/student"]) == 0
    assert sorted((tmp_path / "student/split.csv").read_text().splitlines()) == sorted(moved.splitlines())
    summary = summary_of(tmp_path / "student")
    assert summary["stages"]["head"]["teacher"]["run_dir"] == str(first)
    capsys.readouterr()
    assert distil([str(first), "seed=3"]) == 2
    assert "say which model learns" in capsys.readouterr().err


def test_stages_that_search_heads_have_no_teacher(teacher: Path, tmp_path: Path) -> None:
    tree = student(teacher, ["model.name=resnet18"])
    assert [stage["distill"]["teacher"] for stage in tree["stages"].values()] == [str(teacher)] * 2
    assert (tree["model"], tree["run_dir"]) == ({}, None)
    of_weights = {"unfreeze": "all", "distill": {"teacher": "x.pth", "model": SMALLEST, "image_size": 32, "alpha": 0.9}}
    (tmp_path / "config.yaml").write_text(json.dumps({"stages": {"full": of_weights}, "model": {"name": SMALLEST}}))
    expected = {"teacher": str(tmp_path), "model": None, "image_size": None, "alpha": 0.9}
    assert student(tmp_path, ["model.name=resnet18"])["stages"]["full"]["distill"] == expected
    for chosen_by_labels in ({"search": {"lr": [0.1]}}, {"head": "ridge"}):
        saved = json.dumps({"stages": {"head": {"epochs": 2, **chosen_by_labels}}, "model": {"name": SMALLEST}})
        (tmp_path / "config.yaml").write_text(saved)
        with pytest.raises(UserError, match="every stage of .* searches or fits heads"):
            student(tmp_path, ["model.name=resnet18"])
