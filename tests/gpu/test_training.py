"""Training on a GPU: as on the CPU, and without waiting for the device."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from distil_tl import config as configuration
from distil_tl.training import autotune
from distil_tl.training.network import SplitNetwork
from distil_tl.training.precision import candidates
from distil_tl.training.step import check_finite
from distil_tl.utils.errors import NonFiniteError
from tests.helpers.arguments import WITHOUT_TIMM, small_args
from tests.helpers.devices import StageOnDevice, no_waiting, on_gpu, watched, without_dropout
from tests.helpers.networks import random_model, tiny

DEVICES = ["cpu", on_gpu("cuda")]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Loop:
    """The trainer's loop, in which the host may not wait for the device before the end of an epoch."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.train: Any = importlib.import_module("distil_tl.train")
        self.steps = {"head": 0, "full": 0}
        self.waiting_is_an_error = contextlib.ExitStack()
        original = self.train.optimizer_step

        def optimizer_step(training: Any, *args: Any) -> None:
            original(training, *args)
            self.steps[training.stage.name] += 1
            # The first step may wait: libraries are loaded, and their workspaces set up.
            if self.steps[training.stage.name] == 1:
                self.waiting_is_an_error.enter_context(no_waiting(device))

        monkeypatch.setattr(self.train, "optimizer_step", optimizer_step)
        allowed = watched(self.train.check_finite, before=self.waiting_is_an_error.close)
        monkeypatch.setattr(self.train, "check_finite", allowed)

    def run(self, args: list[str]) -> None:
        try:
            self.train.train(*configuration.load(args))
        finally:
            self.waiting_is_an_error.close()


def loop_args(folder: Path, tmp_path: Path, device: str, *more: str) -> list[str]:
    """13 steps of four images in each stage, in two micro-batches each."""
    return [
        *small_args(folder), WITHOUT_TIMM, "data.global_batch_size=4", "data.max_local_batch_size=2", "data.workers=1",
        "stages.head.features=off", "stages.full.epochs=1", "stages.full.unfreeze=all", "stages.full.ema=0.9",
        "tracking.log_every=100",
        "checkpoint.every_minutes=null", f"distributed.device={device}", f"run_dir={tmp_path}/run", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "fp32"), on_gpu("cuda", "fp32"), on_gpu("cuda", "bf16"), on_gpu("cuda", "fp16")]
)
def test_nothing_waits_for_the_device(
    device: str, precision: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, mixing = Loop(device, monkeypatch), ("stages.full.mixup=0.2", "stages.full.cutmix=1")
    loop.run(loop_args(folder, tmp_path, device, f"precision={precision}", *mixing))
    assert loop.steps == {"head": 13, "full": 13}


@pytest.mark.parametrize("device", DEVICES)
def test_a_planted_item_is_found(device: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(device, monkeypatch)
    original = loop.train.forward_backward

    def forward_backward(*args: Any) -> torch.Tensor:
        loss: torch.Tensor = original(*args)
        loss.item()
        return loss

    monkeypatch.setattr(loop.train, "forward_backward", forward_backward)
    with pytest.raises(RuntimeError, match="synchronizing"):
        loop.run(loop_args(folder, tmp_path, device, "precision=fp32"))
    assert loop.steps == {"head": 1, "full": 0}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "tiny"), on_gpu("cuda", "resnet50"), on_gpu("cuda", "efficientnet_b0"), on_gpu("cuda", "vit_b_16")],
)
def test_steps_and_metrics_are_those_of_the_whole_network_on_a_cpu(
    device: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen part split off, on the device, and the whole network on the CPU; a step with NaN included."""
    found = []
    for kind in (device, "reference"):
        torch.manual_seed(0)
        model = without_dropout(tiny() if name == "tiny" else random_model(name, 2))
        if kind == "reference":
            refuse_to_cut(monkeypatch)
        stage = StageOnDevice(model, folder, "cpu" if kind == "reference" else device)
        assert isinstance(stage.training.inner, SplitNetwork) == (kind != "reference")
        stage.spoil(3)
        tensors = [stage.step() for _ in range(3)]
        good = stage.weights()
        counted = stage.training.meter.total()
        stage.step()
        stage.step()
        assert float(stage.training.first_bad_step) == 3
        assert all(torch.equal(a, b) for a, b in zip(good, stage.weights(), strict=True)), "no step after a bad one"
        with pytest.raises(NonFiniteError, match="in step 4 of stage full"):
            check_finite(stage.info, stage.training)
        found.append(([float(loss) for loss in tensors], counted.count, counted.compute(), good))
    (losses, count, metrics, weights), (their_losses, their_count, their_metrics, their_weights) = found
    assert losses == pytest.approx(their_losses, rel=2e-3)
    assert count == their_count == 24
    assert metrics["loss"] == pytest.approx(their_metrics["loss"], rel=2e-3)
    assert metrics["top1"] == pytest.approx(their_metrics["top1"], abs=1 / 24)  # two equal logits
    for mine, theirs in zip(weights, their_weights, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-2, atol=1e-4)


def refuse_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("distil_tl.training.stage_setup")

    def cut(*args: Any) -> None:
        raise module.CannotCutError("not in this test")

    monkeypatch.setattr(module, "cut_frozen_prefix", cut)


@pytest.mark.parametrize("device", DEVICES)
def test_in_fp16_a_loss_that_is_nan_stops_the_optimizer(device: str, folder: Path) -> None:
    stage = StageOnDevice(without_dropout(tiny()), folder, device, precision="fp16")
    assert stage.training.scaler.is_enabled()
    stage.spoil(2)
    for _ in range(2):
        stage.step()
    good = stage.weights()
    for _ in range(3):
        stage.step()
    assert float(stage.training.first_bad_step) == 2
    assert all(torch.equal(a, b) for a, b in zip(good, stage.weights(), strict=True))
    with pytest.raises(NonFiniteError, match="in step 3 of stage full"):
        check_finite(stage.info, stage.training)


@pytest.mark.parametrize("device", DEVICES)
def test_in_fp16_a_scale_that_is_too_large_is_halved(device: str, folder: Path) -> None:
    stage = StageOnDevice(without_dropout(tiny()), folder, device, precision="fp16")
    stage.training.scaler = torch.amp.GradScaler(device, init_scale=2.0**120)
    before = stage.weights()
    stage.step()
    assert all(torch.equal(a, b) for a, b in zip(before, stage.weights(), strict=True))
    assert stage.training.scaler.get_scale() == 2.0**119
    check_finite(stage.info, stage.training)  # it is not an error


@pytest.mark.parametrize(("device", "name", "size"), [("cpu", "tiny", 32), on_gpu("cuda", "resnet50", 224)])
def test_a_trial_chooses_the_precision(
    device: str, name: str, size: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "WORTH", 0)
    model = tiny() if name == "tiny" else random_model(name, "all")
    stage = StageOnDevice(model, folder, device, unfreeze="all", image_size=size, precision="auto")
    names = [str(each) for each in candidates("auto", stage.model.module, torch.device(device))]
    assert stage.record.precision in names
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        assert stage.record.precision.startswith("bf16")
