"""`auto`: numbers from the number of images, recorded, and kept on resume on any number of ranks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distil_tl import auto_settings
from distil_tl import run as run_module
from distil_tl import train as train_module
from distil_tl.auto_settings import auto_problem, resolve_auto, settle_auto, settle_views
from distil_tl.config import load, problems
from distil_tl.data.config import DataConfig, auto_batch_size
from distil_tl.data.scan import scan
from distil_tl.inference import restore_model
from distil_tl.train import main
from distil_tl.training.auto_rules import auto_epochs, auto_layer_decay, auto_lr
from distil_tl.training.config import StageConfig
from distil_tl.utils.log import setup_console
from tests.helpers.arguments import head_args
from tests.helpers.images import make_folder
from tests.helpers.paths import ROOT
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import refusal, refused, summary_of
from tests.helpers.staging import ALONE

BOTH = ["data.global_batch_size=auto", "stages.head.epochs=auto"]


def test_the_table_in_the_documentation() -> None:
    text = (ROOT / "docs" / "length.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| ([\d,]+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for images, batch, steps, epochs in ([int(cell.replace(",", "")) for cell in row] for row in rows):
        assert auto_batch_size(images) == batch
        assert images // batch == steps
        assert auto_epochs(steps) == epochs


@pytest.mark.parametrize("images", [*range(1, 300), 2047, 2048, 10**7])
def test_a_batch_is_a_power_of_two_that_the_images_fill(images: int) -> None:
    batch = auto_batch_size(images)
    assert 1 <= batch <= min(images, 128)
    assert batch & (batch - 1) == 0
    assert 2 <= auto_epochs(images // batch) <= 50


def test_what_was_recorded_is_kept() -> None:
    config, _ = load(["model.name=resnet18", "model.weights=none", *BOTH, "stages.full.epochs=4"])
    now, found = resolve_auto(config, 569, {})
    assert found == {"data.global_batch_size": 32, "stages.head.epochs": 35}
    assert (now.data.global_batch_size, now.stages["head"].epochs, now.stages["full"].epochs) == (32, 35, 4)
    assert config.data.global_batch_size == "auto"
    saved = {"data.global_batch_size": 16, "stages.head.epochs": 7, "stages.full.epochs": 3}
    again, kept = resolve_auto(config, 569, {"resolved": saved})
    assert kept == {"data.global_batch_size": 16, "stages.head.epochs": 7}
    assert again.stages["full"].epochs == 4, "a number that was given before the stage begins"
    again, kept = resolve_auto(config, 569, {"resolved": saved, "stages": {"head": {}, "full": {}}})
    assert (kept, again.stages["full"].epochs) == (saved, 3), "what max_minutes made of it"


def test_numbers_and_auto_are_valid_and_other_values_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH", "16")
    config, _ = load(["model.name=resnet18", "model.weights=none", "data.global_batch_size=${oc.env:BATCH}", BOTH[1]])
    assert config.data.global_batch_size == 16
    assert list(problems(config, 4)) == []
    for value in ("fast", 2.5, True, None, [4]):
        (problem,) = StageConfig(epochs=value).problems("head")
        assert problem == f"stages.head.epochs is {value!r}; give a whole number, or auto"
        (problem,) = DataConfig(global_batch_size=value).problems()
        assert problem == f"data.global_batch_size is {value!r}; give a whole number, or auto"


def test_epochs_that_leave_none_to_mix_in_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["stages.full.epochs=auto", "stages.full.mixup=0.2", "stages.full.mix_off_epochs=2"]
    config, _ = load(["model.name=resnet18", "model.weights=none", *more])
    setup_console(True)
    settle_auto(config, 569, {}, 1)
    assert "mixes no images" not in capsys.readouterr().out
    now, _ = settle_auto(config, 100_000, {}, 1)
    assert now.stages["full"].epochs == 2
    said = "stages.full mixes no images: it has 2 epochs, and stages.full.mix_off_epochs=2; set a smaller one"
    assert said in capsys.readouterr().out
    settle_auto(config, 100_000, {"stages": {"full": {}}, "resolved": {"stages.full.epochs": 2}}, 1)
    assert "mixes no images" not in capsys.readouterr().out, "it was said when the stage began"


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    found = {"data.global_batch_size": 8}
    assert [auto_problem(found, 60, ranks) for ranks in (1, 2, 4, 8)] == [None] * 4
    assert "data.global_batch_size=auto is 8 for 60 training images" in (auto_problem(found, 60, 16) or "")
    assert auto_problem(found, 60, 3) is not None
    assert auto_problem({"stages.head.epochs": 3}, 60, 3) is None, "the batch was given"


def test_a_run_on_other_ranks_keeps_the_numbers_of_its_beginning(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_settings, "auto_epochs", lambda steps: 12 // steps)
    args = [*small, "data.global_batch_size=auto", "stages.head.epochs=auto", f"run_dir={tmp_path}/run"]

    def fail(*args: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "finish", fail)
        assert main(args) == 1
    assert "auto: data.global_batch_size=8, stages.head.epochs=2 (52 training images)" in capsys.readouterr().out
    state = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())
    resolved = {
        "data.global_batch_size": 8, "stages.head.epochs": 2, "data.crop_mode": "weights", "data.augment": "light"
    }  # fmt: skip
    assert state["run"]["resolved"] == resolved

    monkeypatch.setattr(auto_settings, "auto_batch_size", lambda images: 4)  # a newer version with another rule
    assert main(args) == 0
    assert "global batch 8" not in capsys.readouterr().out, "nothing was left to train"
    assert summary_of(tmp_path / "run")["resolved"] == resolved
    assert len(lines(tmp_path / "run", split="val", stage="head")) == 2


@pytest.mark.parametrize(("size", "mode"), [((40, 40), "weights"), ((40, 43), "weights"), ((30, 40), "squash")])
def test_the_crop_depends_on_the_proportions(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    for i in range(9):
        for split in ("train", "val"):
            path = tmp_path / "images" / split / f"{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Upright and lying ones, and a few of another kind.
            Image.new("RGB", (size if i % 2 else size[::-1]) if i < 7 else (10, 90)).save(path)
    (tmp_path / "images/train/0/damaged.png").write_bytes(b"not an image")
    config, _ = load(["model.name=resnet18", "model.weights=none", f"data.root={tmp_path}/images"])
    train = scan(tmp_path / "images" / "train")
    augment = "flip" if mode == "squash" else "light"
    assert settle_views(ALONE, config, train, {})[1] == {"data.crop_mode": mode, "data.augment": augment}
    saved = {"resolved": {"data.crop_mode": "border", "data.augment": "strong"}}
    now, found = settle_views(ALONE, config, train, saved)
    assert (now.data.crop_mode, now.data.augment, found) == ("border", "strong", saved["resolved"])
    config.data.crop_mode = "squash"
    assert settle_views(ALONE, config, train, {})[1] == {"data.augment": "flip"}
    config.data.hflip = False
    assert settle_views(ALONE, config, train, {})[1] == {"data.augment": "light"}, "else nothing would be augmented"
    config.stages["full"].augment = "strong"
    assert settle_views(ALONE, config, train, {})[1] == {}, "no stage has it"
    config.data.augment = "light"
    assert settle_views(ALONE, config, train, saved) == (config, {})


def test_all_ranks_have_the_crop_that_rank_0_chose(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", {"train": 16, "val": 8})
    for path in folder.rglob("*.png"):
        Image.open(path).resize((40, 30)).save(path)
    for ranks in (1, 2):
        args = head_args(folder, tmp_path / str(ranks), "stages.head.epochs=1", "stages.full.epochs=0")
        assert run_ranks(ranks, train, args) == [0] * ranks
    one, two = (summary_of(tmp_path / name) for name in ("1", "2"))
    assert one["resolved"] == two["resolved"] == {"data.crop_mode": "squash"}
    assert one["best"]["top1"] == two["best"]["top1"]
    assert one["best"]["loss"] == pytest.approx(two["best"]["loss"], rel=1e-5)


def test_the_crop_that_auto_chose_is_that_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation and after a resume, also with a later rule; a run that an earlier version began keeps its own."""
    run_dir, folder = tmp_path / "run", make_folder(tmp_path / "images", {"train": 16, "val": 8})
    args = head_args(folder, run_dir, "stages.head.epochs=1", "data.crop_mode=auto")
    monkeypatch.setattr(auto_settings, "crop_for", lambda ratio: "squash")
    assert main([*args, "stages.full.epochs=0"]) == 0
    assert "auto: data.crop_mode=squash" in capsys.readouterr().out
    assert summary_of(run_dir)["resolved"]["data.crop_mode"] == "squash"
    assert restore_model(run_dir).model.preprocess.crop_mode == "squash"
    changed = restore_model(run_dir, overrides=["data.crop_pct=0.5"]).model.preprocess
    assert (changed.crop_mode, changed.crop_pct) == ("squash", 0.5)
    assert restore_model(run_dir, overrides=["data.crop_pct=null"]).model.preprocess.crop_pct == 1

    monkeypatch.setattr(auto_settings, "crop_for", lambda ratio: "border")
    assert main(args) == 0
    assert restore_model(run_dir).model.preprocess.crop_mode == "squash"
    saved = run_dir / "config.yaml"
    saved.write_text(saved.read_text().replace("crop_mode: auto", "crop_mode: weights"))
    assert load([f"run_dir={run_dir}", f"data.root={folder}"])[0].data.crop_mode == "weights"


def test_fewer_images_than_a_batch(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "few", {"train": 6, "val": 6})
    args = [f"data.root={folder}", *small[1:], "stages.full.epochs=0", f"run_dir={tmp_path}/run"]
    assert "set data.global_batch_size to at most 6, or to auto" in refused(args, capsys)
    assert run_ranks(4, train, [*args, "data.global_batch_size=auto"]) == [0] * 4
    assert [line["samples_seen"] for line in lines(tmp_path / "run", split="val")] == [4]
    shutil.rmtree(tmp_path / "run")
    results = run_ranks(3, refusal, [*args, "data.global_batch_size=auto"])
    assert {status for status, _ in results} == {2}
    assert "data.global_batch_size=auto is 4 for 6 training images" in results[0][1]


def test_the_learning_rate_follows_from_the_accuracy_before() -> None:
    assert auto_lr(None, 10) == auto_lr(0.99, 10) == auto_lr(0.73, 10) == 3e-4, "nothing is known, or much was learned"
    assert auto_lr(0.28, 10) == auto_lr(0.4, 10) == auto_lr(0.55, 10) == 1e-3
    assert auto_lr(0.19, 10) == auto_lr(0.1, 10) == auto_lr(0.0, 10) == 5e-4, "next to nothing was learned"
    assert 5e-4 < auto_lr(0.235, 10) < 1e-3
    middle = auto_lr(0.64, 10)
    assert middle == pytest.approx((3e-4 * 1e-3) ** 0.5, rel=0.01), "halfway, geometrically"
    assert auto_lr(0.8, 2) == middle, "of two classes a random choice gets half"
    assert auto_lr(1.0, 1) == 3e-4
    assert [auto_layer_decay(top1, 10) for top1 in (None, 0.73, 0.64, 0.55)] == [0.9, 0.9, 0.95, 1.0]
    for value in ("fast", True, None, [4], 0, -1, float("nan"), float("inf")):
        (problem,) = StageConfig(lr=value).problems("head")
        assert re.fullmatch(r"stages.head.lr is .*; give a positive number, or auto", problem)
    assert [StageConfig(lr=value).lr for value in (1, "1e-3", "auto")] == [1.0, 1e-3, "auto"]


def test_a_learning_rate_of_too_many_digits_is_refused(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for sign, shown in (("", "inf"), ("-", "-inf")):
        assert main([*small, f"stages.full.lr={sign}1{'0' * 400}"]) == 2
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert message.endswith(f"stages.full.lr is {shown}; give a positive number, or auto")


def test_a_resumed_stage_keeps_its_learning_rates(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = ("stages.full.lr=auto", "stages.full.layer_decay=auto")
    args = [*small, *auto, "optim.schedule=constant", "optim.warmup=0", f"run_dir={tmp_path}/run"]
    evaluate_epoch, calls = train_module.evaluate_epoch, iter(range(1, 9))

    def fails_in_the_last_epoch(*given: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("killed")
        return evaluate_epoch(*given)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "auto_lr", lambda top1, classes: 0.001 * top1 + 0.01 * classes)
        patch.setattr(run_module, "auto_layer_decay", lambda top1, classes: 0.25)
        patch.setattr(train_module, "evaluate_epoch", fails_in_the_last_epoch)
        assert main(args) == 1
    (head,) = lines(tmp_path / "run", split="val", stage="head")
    expected = 0.001 * head["top1"] + 0.03
    assert f", lr {expected:g} (auto), layer decay 0.25 (auto), " in capsys.readouterr().out
    monkeypatch.setattr(run_module, "auto_lr", lambda top1, classes: 0.5)  # a newer version with another rule
    assert main(args) == 0
    rates = {line["lr"] for line in lines(tmp_path / "run", split="train", stage="full")}
    assert rates == {expected}
    stages = summary_of(tmp_path / "run")["stages"]
    assert (stages["head"]["lr"], stages["full"]["lr"]) == (None, expected)
    assert (stages["head"]["layer_decay"], stages["full"]["layer_decay"]) == (None, 0.25)
