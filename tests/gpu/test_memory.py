"""Memory of a GPU: it does not grow from pass to pass, and too little of it is no fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distil_tl.training.interpolation import Interpolation
from tests.helpers.arguments import small_args
from tests.helpers.devices import NEEDS_GPU, StageOnDevice, limited_memory
from tests.helpers.networks import random_model
from tests.helpers.ranks import train
from tests.helpers.runs import losses, summary_of

pytestmark = NEEDS_GPU
PASSES = 40


def test_reserved_memory_does_not_grow(folder: Path) -> None:
    stage = StageOnDevice(random_model("resnet18", "all"), folder, "cuda", unfreeze="all", epochs=PASSES)
    reserved = []
    for _ in range(PASSES):
        for _ in range(stage.training.sampler.steps_per_epoch):
            stage.step()
        with torch.no_grad():
            for batch in stage.training.batches.evaluation():
                stage.training.inner(batch.images)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[9], [number >> 20 for number in reserved]


def run_args(folder: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *small_args(folder), "distributed.device=cuda", "model.name=resnet18", "data.global_batch_size=48",
        "data.image_size=224", "data.augment=none", "stages.head.epochs=0", "stages.full.unfreeze=all",
        "precision=fp32", "tf32=false", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def test_a_run_continues_with_smaller_parts(folder: Path, tmp_path: Path) -> None:
    assert train(run_args(folder, tmp_path / "whole")) == 0
    with limited_memory(900):
        assert train(run_args(folder, tmp_path / "parts")) == 0
    assert summary_of(tmp_path / "parts")["stages"]["full"]["part_sizes"]["training"] < 48
    assert losses(tmp_path / "parts", "full") == pytest.approx(losses(tmp_path / "whole", "full"), rel=0.01)


def test_one_image_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with limited_memory(250):
        status = train(run_args(folder, tmp_path / "run", "data.image_size=1024"))
    output = capfd.readouterr()
    assert status == 2, output.err
    assert "too little memory for" in output.err
    assert "Traceback" not in output.err + output.out


def test_weights_of_an_interpolation_are_in_the_memory_of_the_host() -> None:
    weight = torch.arange(6.0, device="cuda")
    line = Interpolation({"weight": weight})
    weight.fill_(3)
    line.offer({"top1": 0.5, "loss": 1.0}, "top1", preferred=False)
    assert all(held.device.type == "cpu" for which in ("start", "best") for held in line.state()[which].values())
    for alpha, expected in ((0.0, torch.arange(6.0)), (1.0, torch.full((6,), 3.0))):
        line.apply(alpha)
        assert torch.equal(weight.cpu(), expected)
