"""Calibration: its figures, and the temperature, against formulas and other implementations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distil_tl
from distil_tl.cli import predict
from distil_tl.data.loader import Batch
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.evaluate import main as evaluate
from distil_tl.train import main as train
from distil_tl.training import calibration as module
from distil_tl.training.calibration import (
    BINS,
    Calibration,
    CalibrationSums,
    KeptLogits,
    Logits,
    best_temperature,
    with_temperature,
)
from tests.helpers.arguments import small_args
from tests.helpers.ranks import run_ranks
from tests.helpers.staging import ALONE

CPU = torch.device("cpu")


def made(n: int, classes: int, temperature: float = 1.0, seed: int = 0) -> Logits:
    """Logits whose probabilities are right on average with this temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    targets = torch.multinomial(logits.double().softmax(1), 1, generator=generator)[:, 0]
    logits *= temperature
    return Logits(logits.double(), targets, logits.argmax(1))


def counted(given: Logits, temperature: float = 1.0, sizes: int = 7) -> dict[str, Any]:
    sums = CalibrationSums(CPU, temperature)
    for part in zip(*(torch.split(each, sizes) for each in given), strict=True):
        sums.update(part[0].float(), part[1], part[2], torch.ones(len(part[0]), dtype=torch.bool))
    return sums.figures()


def in_order(given: Logits, order: Tensor) -> Logits:
    return Logits(*(each[order] for each in given))


@pytest.mark.parametrize("classes", [2, 7])
def test_the_figures_are_those_of_the_formulas_and_of_sklearn(classes: int) -> None:
    given = made(401, classes, temperature=2.0)
    found = counted(given)
    p, targets = given.logits.softmax(1).numpy(), given.targets.numpy()
    confidence, correct = p.max(1), p.argmax(1) == targets
    ece = 0.0
    for i in range(BINS):
        inside = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        assert found["bins"][i]["n"] == inside.sum()
    assert found["n"] == 401
    assert found["ece"] == pytest.approx(ece, abs=1e-9)
    assert found["nll"] == pytest.approx(sklearn.metrics.log_loss(targets, p), abs=1e-9)
    assert found["brier"] == pytest.approx(((p - np.eye(classes)[targets]) ** 2).sum(1).mean(), abs=1e-9)
    accuracy, mean = sklearn.calibration.calibration_curve(correct, confidence, n_bins=BINS)
    shown = [each for each in found["bins"] if each["n"]]
    assert [each["accuracy"] for each in shown] == pytest.approx(accuracy)
    assert [each["confidence"] for each in shown] == pytest.approx(mean)
    assert sum(each["n"] * each["accuracy"] for each in shown) == pytest.approx(correct.sum())


def test_the_order_and_the_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    given = made(500, 5)
    mixed = in_order(given, torch.randperm(500, generator=torch.Generator().manual_seed(1)))
    assert counted(given) == counted(mixed, sizes=64)
    monkeypatch.setattr(module, "_PART", 40)  # eight images
    assert counted(given) == counted(mixed, sizes=64)


def test_images_that_do_not_count_and_figures_that_are_not_known() -> None:
    given, sums = made(20, 3), CalibrationSums(CPU)
    valid = torch.arange(20) % 2 == 0
    sums.update(given.logits, given.targets, given.predicted, valid)
    assert sums.figures() == counted(in_order(given, valid.nonzero()[:, 0]))
    assert [CalibrationSums(CPU).figures()[key] for key in ("n", "ece", "nll", "brier")] == [0, None, None, None]
    for value in (float("nan"), float("inf")):
        logits = given.logits.clone()
        logits[3, 1] = value
        found = counted(given._replace(logits=logits))
        assert [found[key] for key in ("n", "ece", "nll", "brier")] == [19, None, None, None]
    one = counted(Logits(torch.randn(9, 1), torch.zeros(9).long(), torch.zeros(9).long()))
    assert [one[key] for key in ("ece", "nll", "brier")] == [0, 0, 0]
    assert one["bins"][-1] == {"low": 14 / 15, "high": 1.0, "n": 9, "confidence": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_temperature_is_that_of_lbfgs(temperature: float, classes: int) -> None:
    given = made(2000, classes, temperature)
    log = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.LBFGS(
        [log], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(given.logits / log.exp(), given.targets)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = best_temperature(given, "val")
    assert not isinstance(found, str)
    assert found[0] == pytest.approx(float(log.detach().exp()), rel=2e-6)
    assert found[0] == pytest.approx(temperature, rel=0.1)
    assert counted(given, found[0])["nll"] <= counted(given)["nll"]
    again = [best_temperature(made(500, classes, temperature, seed), "val") for seed in range(30)]
    spread = torch.tensor([each[0] for each in again if not isinstance(each, str)]).std()
    assert found[1] * 2 == pytest.approx(float(spread), rel=0.4), "of 500 images twice that of 2,000"


def test_no_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    given = made(400, 3)
    assert best_temperature(in_order(given, torch.arange(99)), "val") == (
        "val has 99 images, and a temperature is fitted to at least 100"
    )
    right, wrong = given._replace(targets=given.predicted), given._replace(targets=given.logits.argmin(1))
    assert str(best_temperature(right, "val")).endswith("val has almost no mistakes")
    tiny = given._replace(logits=given.logits * 1e-4)
    assert str(best_temperature(tiny, "val")).endswith("the logits differ too little")
    assert str(best_temperature(wrong, "val")).endswith("on val the probabilities say nothing")
    assert best_temperature(Logits(given.logits[:, :1], *given[1:]), "val") == "there is one class"
    assert best_temperature(given._replace(logits=given.logits / 0), "val") == "a logit is not finite"
    monkeypatch.setattr(module, "MAX_ERROR", 0.01)
    assert str(best_temperature(given, "val")).startswith("val says too little: the standard error would be ")


def test_probabilities_with_a_temperature_keep_their_order() -> None:
    logits = made(50, 6).logits.float()
    logits[0] = torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0, 0.0])
    logits[1] = torch.tensor([200.0, 0.0, 0.0, 0.0, 0.0, -200.0])
    raw = logits.softmax(1)
    raw[2, 1] = torch.nextafter(raw[2, 0], torch.ones(()))  # the next number
    for temperature in (0.3, 1.0, 4.0):
        found = with_temperature(raw, temperature)
        orders = [p.argsort(dim=1, stable=True, descending=True) for p in (found, raw)]
        assert torch.equal(*orders)
        expected = (raw.double().log() / temperature).softmax(1)
        assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-12)
        assert found[3:].numpy() == pytest.approx((logits[3:].double() / temperature).softmax(1).numpy(), rel=1e-4)


# Ranks.

LIMIT = 6 * 250  # logits: of 790 images every fourth is kept


def share(info: DistInfo) -> Calibration:
    """The calibration of this rank's images, of which every 50th is bad, in batches of 16."""
    given, found = made(790, 6, 1.7), Calibration.empty(6, CPU, None)
    found.kept = KeptLogits(6, LIMIT)
    for part in torch.split(torch.arange(info.rank, 790, info.world_size), 16):
        logits, targets, predicted = in_order(given, part)
        images = torch.zeros(len(part), 3, 1, 1, dtype=torch.uint8)
        found.add(logits.float(), predicted, Batch(images, targets, part, part % 50 != 0, []))
    return found.reduce(info)


def fit_on_ranks() -> dict[str, Any]:
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu", timeout_seconds=60)) as info:
        found = share(info)
        found.fit(info, "val")
        assert found.kept.every == 4, "images are dropped before any are sent"
        return found.figures()


def test_any_number_of_ranks_gives_the_same_and_large_splits_are_thinned() -> None:
    given, alone = made(790, 6, 1.7), share(ALONE)
    kept = torch.tensor([i for i in range(0, 790, 4) if i % 50])
    logits, targets, predicted = alone.kept.gather(ALONE)
    assert torch.equal(logits, given.logits[kept].float().double())
    assert torch.equal(targets, given.targets[kept])
    assert torch.equal(predicted, given.predicted[kept])
    alone.fit(ALONE, "val")
    figures = alone.figures()
    fitted = best_temperature(Logits(logits, targets, predicted), "val")
    assert (figures["temperature"], figures["standard_error"]) == fitted
    assert (figures["raw"]["n"], figures["calibrated"]["n"]) == (790 - 16, len(kept))
    for ranks in (2, 3):  # of two, one has no image that is kept
        assert run_ranks(ranks, fit_on_ranks) == [figures] * ranks


def test_ranks_without_images() -> None:
    found = KeptLogits(3).gather(ALONE)
    assert [tuple(each.shape) for each in found] == [(0, 3), (0,), (0,)]


# Runs.


@pytest.fixture(scope="module")
def run_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose temperature is fitted to the 31 images of val, and that is evaluated on the same images as test."""
    images = tmp_path_factory.mktemp("images")
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        (images / split).symlink_to(folder / source)
    run_dir: Path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_IMAGES", 30)
        patch.setattr(module, "MAX_ERROR", 9.0)
        assert train([*small_args(images), f"run_dir={run_dir}", "stages.full.epochs=1"]) == 0
    return run_dir


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_run_keeps_its_temperature_with_the_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {split: read(run_dir / f"evaluation{split}.json")["calibration"] for split in ("", "_test")}
    saved, summary = read(run_dir / "checkpoints/best/calibration.json"), read(run_dir / "summary.json")
    temperature = saved["temperature"]
    assert module.LOWEST < temperature < module.HIGHEST
    assert saved == summary["calibration"]["val"]
    assert found[""]["temperature"] == found["_test"]["temperature"] == temperature
    for name, figures in found[""].items():
        if name in ("raw", "calibrated"):  # the same images, evaluated once more
            assert figures["nll"] == pytest.approx(found["_test"][name]["nll"], rel=1e-6)
            assert summary["calibration"]["test"][name]["nll"] == found["_test"][name]["nll"]
    assert found[""]["raw"]["nll"] == pytest.approx(summary["best"]["loss"], rel=1e-4)
    assert found[""]["calibrated"]["nll"] < found[""]["raw"]["nll"]
    capsys.readouterr()
    assert evaluate([str(run_dir), "--split", "test", "--json", str(tmp_path / "test.json")]) == 0
    again = read(tmp_path / "test.json")["calibration"]
    assert again["calibrated"]["nll"] == pytest.approx(found["_test"]["calibrated"]["nll"], rel=1e-6)
    assert f"with the temperature {temperature:.4g}: ECE {again['calibrated']['ece']:.4f}" in capsys.readouterr().out


def rows(run_dir: Path, folder: Path, *more: str) -> tuple[bytes, list[str], list[list[float]]]:
    """The CSV of predict, its predictions, and its probabilities of the classes."""
    out = run_dir.parent / "out.csv"
    assert predict.main([str(run_dir), str(folder / "val"), "--all", "-o", str(out), *more]) == 0
    cells = [line.split(",") for line in out.read_text().splitlines()[1:]]
    return out.read_bytes(), [row[1] for row in cells], [[float(cell) for cell in row[3:6]] for row in cells]


def test_predictions_are_calibrated_and_can_be_had_without(
    run_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = (run_dir / "checkpoints" / "best").resolve() / "calibration.json"
    content, temperature = file.read_text(), read(file)["temperature"]
    calibrated, raw = rows(run_dir, folder), rows(run_dir, folder, "--uncalibrated")
    assert calibrated[1] == raw[1]
    assert calibrated[2] != raw[2]
    powers = np.array(raw[2]) ** (1 / temperature)
    assert np.array(calibrated[2]) == pytest.approx(powers / powers.sum(1, keepdims=True), abs=2e-5)
    loaded = distil_tl.load(run_dir)
    image = sorted((folder / "val").rglob("*.png"))[0]
    with torch.inference_mode():
        own = (loaded.model(loaded.transform(image)[None]) / loaded.temperature).softmax(1)
    assert own[0].tolist() == pytest.approx(calibrated[2][0], abs=1e-5)
    file.unlink()  # as a run of earlier code
    assert rows(run_dir, folder)[0] == raw[0]
    assert distil_tl.load(run_dir).temperature == 1
    for damage in ("{", "[]", '{"temperature": 0.0}', '{"temperature": NaN}', '{"temperature": "1"}'):
        file.write_text(damage)
        assert predict.main([str(run_dir), str(folder / "val")]) == 2
        assert f"{file} is damaged: restore it, or remove it for" in capsys.readouterr().err
    file.write_text('{"temperature": null}')
    assert rows(run_dir, folder)[0] == raw[0]
    file.write_text(content)


def test_too_few_images_of_val_are_reported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert train([*small_args(folder), f"run_dir={run_dir}", "stages.full.epochs=0"]) == 0
    saved, why = read(run_dir / "checkpoints/best/calibration.json"), "val has 31 images, and a temperature is"
    assert (saved["temperature"], saved["calibrated"]) == (None, None)
    assert saved["reason"].startswith(why)
    assert f"no temperature is fitted: {why}" in capsys.readouterr().out
    assert distil_tl.load(run_dir).temperature == 1
