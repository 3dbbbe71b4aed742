"""Resuming a run whose configuration or images have changed: refused and allowed changes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distil_tl.cli.extend import extended
from distil_tl.config import load
from distil_tl.data import pixels
from distil_tl.data.scan import scan
from distil_tl.data.splits import Splits
from distil_tl.rundir.changes import earlier_defaults
from distil_tl.rundir.opening import look_for_start
from distil_tl.rundir.start import Start
from distil_tl.train import main
from distil_tl.utils.args import read_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import setup_console
from tests.helpers.arguments import small_args
from tests.helpers.images import draw
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import refused, same_result, stopped_train


def start_of(args: list[str]) -> Start:
    config, unresolved = load(args)
    return look_for_start(dataclasses.asdict(config), unresolved)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main([*small_args(folder), f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its first stage, after 3 of 6 steps."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert run_ranks(1, stopped_train, [*small_args(folder), f"run_dir={run_dir}"], 3, 0, signal.SIGTERM) == [3]
    return run_dir


@pytest.fixture(scope="module")
def in_full(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second stage, after 14 of 18 steps."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert run_ranks(1, stopped_train, [*small_args(folder), f"run_dir={run_dir}"], 14, 0, signal.SIGTERM) == [3]
    return run_dir


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "data")
    return tmp_path / "data"


def with_environment(body: Callable[..., int], variables: dict[str, str], *args: Any) -> int:
    os.environ |= variables
    return body(*args)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Images that have changed.


def test_drift_is_refused_with_what_was_added_removed_and_resized(
    run_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = sorted((data / "train" / "noise").iterdir())
    for path in noise[:4]:
        path.unlink()
    draw("noise", np.random.default_rng(9)).save(data / "train" / "circles" / "new.png")
    noise[5].write_bytes(noise[5].read_bytes() + b" ")
    before = content(run_dir)
    message = refused([*small_args(data), f"run_dir={run_dir}"], capsys)
    first, second, third = (f"'noise/{path.name}'" for path in noise[:3])
    started_with = read_yaml(run_dir / "config.yaml")["data"]["root"]
    assert (
        f"the images in {data}/train differ from those that this run was started with (1 added ('circles/new.png'); "
        f"4 removed ({first}, {second}, {third} and 1 more); 1 changed in size ('noise/{noise[5].name}'); "
        f"data.root was {started_with}); restore them, or choose another run_dir"
    ) in message
    assert content(run_dir) == before, "nothing was written"


def test_drift_of_val_and_of_classes_is_refused(run_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = sorted((data / "val" / "circles").iterdir())[0]
    gone.rename(data / "val" / "noise" / "moved.png")
    message = refused([*small_args(data), f"run_dir={run_dir}"], capsys)
    assert f"the images in {data}/val differ from those" in message
    assert f"1 added ('noise/moved.png'); 1 removed ('circles/{gone.name}')" in message

    (data / "train" / "noise").rename(data / "train" / "rustle")
    (data / "val" / "noise").rename(data / "val" / "rustle")
    message = refused([*small_args(data), f"run_dir={run_dir}"], capsys)
    assert "the list of classes changed" in message


def test_resuming_from_another_run_names_the_drift_as_well(
    run_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = sorted((data / "train" / "circles").iterdir())[0]
    gone.unlink()
    message = refused([*small_args(data), f"run_dir={tmp_path}/next", f"resume={run_dir}"], capsys)
    assert f"1 removed ('circles/{gone.name}')" in message
    data.rename(tmp_path / "other")
    message = refused([*small_args(tmp_path / "other"), f"run_dir={run_dir}"], capsys)
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["root"]
    assert f"1 removed ('circles/{gone.name}'); data.root was {saved})" in message


def test_drift_is_relative_to_the_images_that_training_began_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first attempt was killed before it saved anything; later attempts are not compared with its images."""
    run_dir = tmp_path / "run"
    noise = sorted((data / "train" / "noise").iterdir())
    args = [*small_args(data), f"run_dir={run_dir}"]
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, stopped_train, args, 1, 0, signal.SIGKILL)
    assert not (run_dir / "checkpoints").exists()
    noise[0].unlink()
    assert run_ranks(1, stopped_train, args, 2, 0, signal.SIGTERM) == [3]
    noise[1].unlink()
    message = refused(args, capsys)
    assert f"(1 removed ('noise/{noise[1].name}'))" in message


@pytest.mark.parametrize("content", [None, b"", b"junk", 300, -100], ids=["gone", "empty", "junk", "half", "nearly"])
def test_a_damaged_list_of_images_names_no_differences_and_is_written_again(
    run_dir: Path, data: Path, content: bytes | int | None
) -> None:
    lists = run_dir / "index" / "train.npz"
    indexes = {split: scan(data / split) for split in ("train", "val")}
    before = lists.read_bytes()
    if content is None:
        lists.unlink()
    else:
        lists.write_bytes(before[:content] if isinstance(content, int) else content)
    state = json.loads(next((run_dir / "checkpoints").glob("step-*/state.json")).read_text())
    splits = Splits(indexes["train"], indexes["val"], None)
    splits.refuse_changed_images(state["data"], run_dir)
    other = Splits(indexes["val"], indexes["val"], None)
    with pytest.raises(UserError, match=r"started with \(files were added, removed or changed\); restore them"):
        other.refuse_changed_images(state["data"], run_dir)
    splits.save(run_dir)
    with pytest.raises(UserError, match="removed"):
        other.refuse_changed_images(state["data"], run_dir)


def test_a_decoder_that_gives_other_pixels_is_refused(
    run_dir: Path, small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run_dir)
    monkeypatch.setattr(pixels, "digest", lambda name: f"another {name}")
    message = refused([*small, f"run_dir={run_dir}"], capsys)
    assert f"gives other pixels than the one that {run_dir} was trained with; its env.json has the versions" in message
    assert content(run_dir) == before, "nothing was written"


# Settings that have changed.


def test_a_missing_configuration_is_reported(
    run_dir: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = run_dir / "config.yaml"
    saved.write_text("stages: [head\n")
    assert f"{saved} is not valid YAML" in refused([*small, f"run_dir={run_dir}"], capsys)
    saved.unlink()
    (run_dir / "summary.json").write_text("[]")
    setup_console(True)
    start_of([*small, f"run_dir={run_dir}"])
    assert f"{saved} is missing; cannot check for changes" in capsys.readouterr().out


def test_another_value_from_the_environment_is_refused_and_none_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    variables = {"RATE": "0.0123456", "IMAGES": str(folder)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    args = [*small_args(folder), f"run_dir={run_dir}", "optim.weight_decay=${oc.env:RATE}"]
    args.append("data.root=${oc.env:IMAGES}")
    assert run_ranks(1, with_environment, stopped_train, variables, args, 3, 0, signal.SIGTERM) == [3]
    (state,) = (run_dir / "checkpoints").glob("step-*/state.json")
    assert list(json.loads(state.read_text())["interpolated"]) == ["optim.weight_decay"], (
        "the path of the images may change"
    )
    assert not [path for path in run_dir.rglob("*") if path.is_file() and b"0.0123456" in path.read_bytes()]
    start_of(args)
    monkeypatch.setenv("RATE", "0.02")
    message = refused(args, capsys)
    assert "optim.weight_decay: ${oc.env:RATE} has another value than before" in message


@pytest.mark.parametrize(
    "change",
    [
        "seed: was 0, now 1",
        "precision: was 'auto', now 'bf16'",
        "data.global_batch_size: was 8, now 4",
        "data.image_size: was 32, now 40",
        "data.crop_mode: was 'auto', now 'squash'",
        "data.crop_pct: was null, now 0.9",
        "data.augment: was 'auto', now 'none'",
        "data.hflip: was true, now false",
        "model.name: was 'timm/test_resnet', now 'shufflenet_v2_x1_0'",
        "optim.name: was 'sgd', now 'adamw'",
        "optim.momentum: was 0.9, now 0.8",
        "optim.warmup: was 0.1, now 0.2",
        "optim.schedule: was 'cosine', now 'linear'",
        "optim.label_smoothing: was 0.0, now 0.1",
        "optim.clip_norm: was 1.0, now 2.0",
        "stages.head.epochs: was 1, now 2",
        "stages.head.lr: was 0.01, now 0.02",
        "stages.head.unfreeze: was 'head', now 2",
        "stages.head.layer_decay: was 1.0, now 0.5",
        "stages.head.batch_norm: was 'frozen', now 'train'",
        "stages.head.augment: was null, now 'none'",
        "stages.head.image_size: was null, now 40",
    ],
)
def test_a_setting_that_would_make_it_another_training_is_refused_by_name(
    run_dir: Path, small: list[str], capsys: pytest.CaptureFixture[str], change: str
) -> None:
    key, _, now = change.partition(": ")
    value = now.rpartition("now ")[2].strip("'").lower()
    before = content(run_dir)
    message = refused([*small, f"run_dir={run_dir}", f"{key}={value}"], capsys)
    assert f"{run_dir} holds a run of another configuration" in message
    assert f"\n  - {change}\n" in message
    assert message.count("  - ") == 1
    assert "Use the old values, or choose another run_dir." in message
    assert content(run_dir) == before, "nothing was written"


def test_all_changes_are_listed_and_only_of_what_has_begun(
    in_full: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["seed=1", "stages.full.lr=0.5", "stages.head.lr=0.5", "data.workers=1"]
    message = refused([*small, f"run_dir={in_full}", *changes], capsys)
    assert [line for line in message.splitlines() if line.startswith("  - ")] == [
        "  - seed: was 0, now 1",
        "  - stages.full.lr: was 0.001, now 0.5",
        "  - stages.head.lr: was 0.01, now 0.5",
    ]


def test_more_epochs_are_refused_with_the_way_that_exists(
    in_full: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused([*small, f"run_dir={in_full}", "stages.full.epochs=5"], capsys)
    command = message.rstrip().rpartition(": ")[2]
    assert command == f"distil-tl extend {in_full} stages.full.epochs=+3"
    assert list(extended(in_full, command.split()[3:])[0]["stages"]) == ["head", "full", "full_2"]
    assert "distil-tl extend" not in refused([*small, f"run_dir={in_full}", "stages.full.epochs=1"], capsys)
    assert "distil-tl extend" not in refused([*small, f"run_dir={in_full}", "stages.full.epochs=5", "seed=1"], capsys)
    assert "let it end" in message
    assert "completed" not in message
    (in_full / "summary.json").write_text('{"status": "completed"}')
    message = refused([*small, f"run_dir={in_full}", "stages.full.epochs=5"], capsys)
    assert "The run in it is completed. Use the old values" in message
    assert "let it end" not in message


STAGES = {
    "head": "head: {unfreeze: head, epochs: 1, lr: 0.01, layer_decay: 1.0}",
    "full": "full: {unfreeze: 2, epochs: 2, lr: 0.001, layer_decay: 0.9}",
    "warm": "warm: {unfreeze: head, epochs: 1}",
    "idle": "idle: {unfreeze: head, epochs: 0}",
}


@pytest.mark.parametrize(
    ("order", "fine"),
    [
        (("full", "head"), False),
        (("warm", "head", "full"), False),
        (("idle", "head", "full"), True),
        (("head", "warm", "full"), True),
        (("head",), True),
    ],
)
def test_a_stage_can_not_move_ahead_of_one_that_has_begun(
    run_dir: Path, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, order: list[str], fine: bool
) -> None:
    """Otherwise a run in the middle of one stage would resume in the other, and count the first as finished."""
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n" + "".join(f"  {STAGES[name]}\n" for name in order))
    args = [str(stages), *(arg for arg in small if not arg.startswith("stages.")), f"run_dir={run_dir}"]
    if fine:
        assert start_of(args).checkpoint == str(run_dir / "checkpoints" / "step-00000003")
    else:
        assert f"stages: the order was head, now {', '.join(order)}" in refused(args, capsys)


def test_free_keys_may_change_and_the_result_is_the_same(
    uninterrupted: Path, run_dir: Path, data: Path, small: list[str]
) -> None:
    """The images have moved, too."""
    changes = [
        f"data.root={data}",
        "data.workers=1",
        "data.on_bad_image=skip",
        "checkpoint.every_steps=2",
        "checkpoint.every_minutes=1",
        "checkpoint.keep=5",
        "distributed.timeout_seconds=77",
        "distributed.prepare_timeout_seconds=99",
        "distributed.backend=gloo",
        "tracking.log_every=4",
        "tracking.wandb.project=other",
    ]
    assert run_ranks(1, train, [*small, f"run_dir={run_dir}", *changes]) == [0]
    assert [line["step"] for line in lines(run_dir, window="interval")] == [1, 2, 3, 4, 6, 8, 12, 16, 18]
    same_result(run_dir, uninterrupted)


def test_the_local_batch_size_may_change_and_only_rounding_differs(
    uninterrupted: Path, run_dir: Path, small: list[str]
) -> None:
    assert main([*small, f"run_dir={run_dir}", "data.max_local_batch_size=3"]) == 0
    one, two = (lines(path, window="epoch") for path in (run_dir, uninterrupted))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)
    assert [line["step"] for line in one] == [line["step"] for line in two]


def test_a_stage_that_has_not_begun_may_change_freely(run_dir: Path, small: list[str], tmp_path: Path) -> None:
    changed = [*small, "stages.full.lr=0.002", "stages.full.unfreeze=3", "stages.full.epochs=1"]
    assert main([*changed, f"run_dir={run_dir}"]) == 0
    assert main([*changed, f"run_dir={tmp_path}/whole"]) == 0
    same_result(run_dir, tmp_path / "whole")


def test_only_what_a_configuration_has_is_an_earlier_default() -> None:
    then = {"stages.full.lr": 3e-4, "prefer_last": True, "data.augment": "light"}
    assert earlier_defaults(then, ["data.augment"]) == {"stages.full.lr": 3e-4}, "it has no stage head"
    for one in ({"stages.head.augment": None}, {"stages.full.wise_ft": False}):
        assert earlier_defaults(one, []) == one


def test_a_run_keeps_a_default_of_earlier_versions(tmp_path: Path) -> None:
    """Unless the command gives the key, or the run had another value."""
    command = ["model.name=resnet18", "model.weights=none", f"run_dir={tmp_path}"]
    for saved, given, expected in (
        ("3e-4", [], 3e-4), ("3e-4", ["stages.full.lr=auto"], "auto"), ("5e-4", [], "auto"), ("auto", [], "auto"),
    ):  # fmt: skip
        (tmp_path / "config.yaml").write_text(f"stages: {{full: {{lr: {saved}}}}}")
        config, unresolved = load([*command, *given])
        assert config.stages["full"].lr == unresolved.stages.full.lr == expected
    (tmp_path / "config.yaml").write_text("stages: {full: {layer_decay: 0.9}}")
    for recipe in ([], ["recipe=standard"]):
        assert load([*command, *recipe])[0].stages["full"].layer_decay == 0.9
    (tmp_path / "config.yaml").write_text("data: {root: x, augment: light}\nstages: {head: {augment: null}, full: {}}")
    for recipe in ([], ["recipe=standard"]):
        config = load([*command, "data.root=x", *recipe])[0]
        assert (config.data.augment, config.stages["head"].augment) == ("light", None)
    (tmp_path / "config.yaml").write_text("stages: {full: {}}")
    assert load(command)[0].stages["head"].augment == "none", "the run had no such stage"
    (tmp_path / "config.yaml").write_text("stages: {full: {lr: 3e-4}}")
    (tmp_path / "own.yaml").write_text("data: {root: null}\nstages: {head: {unfreeze: head}}")
    assert list(load([str(tmp_path / "own.yaml"), *command])[0].stages) == ["head"]
