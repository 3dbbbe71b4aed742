"""Security: input files can't run code or write outside the run directory, and no secret is written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import distil_tl
from distil_tl.cli.compare import main as compare
from distil_tl.cli.export import main as export
from distil_tl.cli.extend import main as extend
from distil_tl.cli.predict import main as predict
from distil_tl.cli.soup import main as soup
from distil_tl.rundir.checkpoint import find_damage
from distil_tl.train import main
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import sha256_file
from distil_tl.utils.log import add_rank_file, logger, setup_console
from tests.helpers.arguments import small_args
from tests.helpers.images import draw
from tests.helpers.ranks import run_ranks, train
from tests.helpers.runs import evaluated, refused, summary_of

HEAD_ALONE = ["stages.full.epochs=0"]


class Trap:
    """Unpickling it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The folder that exists if code was run."""
    return tmp_path / "it-fired"


def test_the_trap_works(trap: Path) -> None:
    torch.save({"weights": Trap(trap)}, trap.with_name("evil.pth"))
    torch.load(trap.with_name("evil.pth"), weights_only=False)
    assert trap.exists()


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert main([*small_args(folder), *HEAD_ALONE, f"run_dir={run_dir}"]) == 0
    return run_dir


# Pickles.


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_a_pickle_as_pretrained_weights(
    small: list[str], tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str], suffix: str, legacy: bool
) -> None:
    evil = tmp_path / f"evil{suffix}"
    torch.save({"state_dict": {"conv1.0.weight": Trap(trap)}}, evil, _use_new_zipfile_serialization=not legacy)
    message = refused([*small, f"run_dir={tmp_path}/run", f"model.weights={evil}"], capsys)
    assert str(evil) in message
    assert not trap.exists()
    assert not (tmp_path / "run").exists()


def reseal(checkpoint: Path) -> None:
    """Update the checksums, as an attacker could."""
    names = [line.split("  ", 1)[1] for line in (checkpoint / "checksums").read_text().splitlines()]
    (checkpoint / "checksums").write_text("".join(f"{sha256_file(checkpoint / n)}  {n}\n" for n in names))
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("name", ["train_state.pt", "weights.safetensors"])
@pytest.mark.parametrize("by", ["run_dir", "resume"])
def test_a_pickle_in_a_checkpoint_with_valid_checksums(
    finished: Path, small: list[str], tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str], name: str, by: str
) -> None:
    run_dir = tmp_path / "tampered"
    shutil.copytree(finished, run_dir, symlinks=True)
    (run_dir / "summary.json").unlink()
    checkpoint = run_dir / "checkpoints" / "step-00000006"
    torch.save({"stage": "head", "optimizer": Trap(trap)}, checkpoint / name)
    reseal(checkpoint)
    args = [f"run_dir={run_dir}"] if by == "run_dir" else [f"run_dir={tmp_path}/next", f"resume={checkpoint}"]
    message = refused([*small, *HEAD_ALONE, *args], capsys)
    assert f"{checkpoint / name} can't be read" in message
    assert not trap.exists()
    if name == "weights.safetensors":
        assert evaluated([str(run_dir)]) == 2
        assert not trap.exists()


def test_a_pickle_as_the_path_to_resume_from(
    small: list[str], tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "evil.pth"
    torch.save(Trap(trap), evil)
    for path in (evil, tmp_path):
        message = refused([*small, f"run_dir={tmp_path}/run", f"resume={path}"], capsys)
        assert f"resume={path} holds no valid checkpoint" in message
        assert not trap.exists()


def test_a_pickle_in_the_list_of_images(
    finished: Path, folder: Path, tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, root = tmp_path / "tampered", tmp_path / "data"
    shutil.copytree(finished, run_dir, symlinks=True)
    shutil.copytree(folder, root)
    (run_dir / "summary.json").unlink()
    next((root / "train" / "noise").iterdir()).unlink()
    evil = np.array([Trap(trap)], dtype=object)
    np.savez(run_dir / "index" / "train.npz", root=evil, classes=evil, names=evil, fingerprint=evil)
    assert main([*small_args(root), *HEAD_ALONE, f"run_dir={run_dir}"]) != 0
    assert not trap.exists()


# Code beside a run or beside weights.


def test_a_run_directory_that_names_code(
    finished: Path,
    folder: Path,
    small: list[str],
    tmp_path: Path,
    trap: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "shared"
    shutil.copytree(finished, run_dir, symlinks=True)
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["model"]["name"] = "nets_of_another:build"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    (run_dir / "nets_of_another.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    monkeypatch.chdir(run_dir)
    monkeypatch.setattr(sys, "path", list(sys.path))
    there, out = str(run_dir), str(tmp_path / "out")
    learns = [*small, *HEAD_ALONE, f"run_dir={tmp_path}/run", f"stages.head.distill.teacher={there}"]
    for command, args in (
        (predict, [there, str(folder / "val")]), (evaluated, [there]), (soup, [there, "-o", out]),
        (export, [there, "--format", "safetensors", "-o", out]), (compare, [there, there]),
        (extend, [there, "stages.head.epochs=+1"]), (train, learns),
    ):  # fmt: skip
        assert command(args) == 2, command
        assert "nets_of_another:build of the saved configuration names code" in capsys.readouterr().err, command
    with pytest.raises(UserError, match="allow_own=True"):
        distil_tl.load(run_dir)
    assert not trap.exists()
    with pytest.raises(UserError, match="has no build"):
        distil_tl.load(run_dir, allow_own=True)
    assert trap.exists(), "the trap works"


def test_weights_whose_description_names_code(
    small: list[str], tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_beside.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "nets_beside:build", "preprocess": {}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    message = refused([*small, *HEAD_ALONE, "run_dir=run", "stages.head.distill.teacher=model.safetensors"], capsys)
    assert "names nets_beside:build, code that would be imported" in message
    assert not trap.exists()


# Secrets.

SECRET, KEY, OTHER = "hunter2-is-no-password", "f" * 7 + "0123456789" * 3 + "abc", "only-in-the-environment"


def files_with(folder: Path, secret: str) -> list[str]:
    """The files with `secret` in their content or name."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if secret in name or (path.is_file() and secret.encode() in path.read_bytes()):
            found.append(name)
    return found


def secretive_train(args: list[str]) -> int:
    os.environ |= {"TEAM_SECRET": SECRET, "WANDB_API_KEY": KEY, "UNRELATED_TOKEN": OTHER, "WANDB_SILENT": "true"}
    return train(args)


def test_no_secret_is_written(folder: Path, tmp_path: Path) -> None:
    """Two ranks, a bad image to warn of, and a second attempt that finds the run complete."""
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    next((root / "val" / "noise").iterdir()).write_bytes(b"")
    run_dir = tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(
        "tracking: {wandb: {entity: '${oc.env:TEAM_SECRET}', group: '${oc.env:TEAM_SECRET}'}}\n"
        "stages:\n  head: {unfreeze: head, epochs: 1, lr: 0.01}\n"
    )
    plain = [arg for arg in small_args(root) if not arg.startswith("stages.")]
    args = [str(config), *plain, "data.on_bad_image=skip", "data.workers=1", f"run_dir={run_dir}"]
    assert run_ranks(2, secretive_train, [*args, "tracking.wandb.name=${oc.env:TEAM_SECRET}"]) == [0, 0]
    assert run_ranks(2, secretive_train, args) == [0, 0]
    for name in ("config.yaml", "report.html"):
        assert (run_dir / name).read_text().count("${oc.env:TEAM_SECRET}") == 3, name
    for secret in (SECRET, KEY, OTHER):
        assert files_with(tmp_path, secret) == []


def test_weights_and_biases_does_not_write_the_key_either(small: list[str], tmp_path: Path) -> None:
    """Offline, where it keeps everything in files below the run directory."""
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    args = [*small, *HEAD_ALONE, f"run_dir={run_dir}", "tracking.wandb.mode=offline"]
    assert run_ranks(1, secretive_train, args) == [0]
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb")), "W&B has written files"
    assert files_with(run_dir, "macro_f1"), "the search finds text that was written"
    for secret in (SECRET, KEY, OTHER):
        assert files_with(run_dir, secret) == []


def test_no_environment_variable_is_written(
    finished: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = json.loads((finished / "env.json").read_text())
    assert env.keys() == {
        "versions", "git", "command", "host", "launcher", "world_size", "device", "cpus", "start_time",
        "decoders",
    }  # fmt: skip
    assert env["versions"].keys() == {"distil_tl", "python", "torch", "torchvision", "pillow"}
    assert env["git"] is None or env["git"].keys() == {"commit", "dirty"}
    # The values of the variables, without common words that versions or paths contain too.
    values = {value for value in os.environ.values() if len(value) > 12}
    text = json.dumps({key: value for key, value in env.items() if key not in ("command", "host")})
    assert not [value for value in values if value in text]


# Names.

EVIL_NAMES = (
    "../../evil",
    "..",
    "a/b",
    "a\nb",
    "<script>alert(1)</script>",
    "",
    " ",
    "/tmp/evil",
    "a\0b",
    "-rf",
    "a.b",
)


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_unsafe_stage_names_are_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"stages": {name: {"unfreeze": "head", "epochs": 1}}}))  # JSON is YAML
    args = [arg for arg in small if not arg.startswith("stages.")]
    message = refused([str(config), *args, f"run_dir={tmp_path}/run"], capsys)
    assert f"the stage name {name!r} is not valid: use letters, digits, _ and -, starting with a letter" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


NASTY = (
    "....evil",
    "a\n2026-01-01 00:00:00,000 ERROR a forged line",
    "<img src=x onerror=alert(1)>",
    os.fsdecode(b"not \xff UTF-8"),
    "%s %d {0} ${oc.env:HOME}",
    "\u202etxt.exe",
)


def test_names_from_data_stay_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names of classes and files are never part of an output path, a tag of the report, or a forged log line."""
    inside, root = tmp_path / "inside", tmp_path / "data"
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in NASTY:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                draw("noise", rng).save(root / split / name / f"{i} {name}.png")
            (root / split / name / f"bad {name}.png").write_bytes(b"")
    shutil.rmtree(root / "val" / NASTY[1])  # a class that val lacks is named in the log
    inside.mkdir()
    (inside / "only").mkdir()
    run_dir = inside / "only" / "run"
    args = [*small_args(root), *HEAD_ALONE, "data.global_batch_size=9", "data.on_bad_image=skip", f"run_dir={run_dir}"]
    assert run_ranks(1, train, args) == [0]
    assert run_ranks(1, evaluated, [str(run_dir), "--json", str(inside / "out.json")]) == [0]
    said = "".join(capfd.readouterr())
    assert "Logging error" not in said

    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "inside"]
    assert sorted(path.name for path in inside.iterdir()) == ["only", "out.json"]
    assert [path.name for path in (inside / "only").iterdir()] == ["run"]
    names = {part for path in run_dir.rglob("*") for part in path.relative_to(run_dir).parts}
    assert names <= {
        "attempt.json",
        "config.yaml", "env.json", "classes.json", "metrics.jsonl", "summary.json", "evaluation.json", "report.html",
        "checkpoints", "step-00000002", "best", "last", "weights.safetensors", "train_state.pt", "state.json",
        "checksums", "calibration.json", "logs", "rank-0.log", "index", "train.npz", "val.npz", "samples", "head.jpg",
    }  # fmt: skip

    assert json.loads((run_dir / "classes.json").read_text()) == sorted(NASTY)
    assert summary_of(run_dir)["bad_images"]["train"]["count"] == len(NASTY)
    log = (run_dir / "logs" / "rank-0.log").read_text()
    assert log.count("skipped the image") == 2 * len(NASTY) - 1
    assert not [line for line in log.splitlines() if line.startswith("2026-01-01 00:00:00,000")]
    assert "\\n2026-01-01 00:00:00,000 ERROR a forged line" in log
    assert "\u202e" not in log + said

    tags = Tags()
    tags.feed((run_dir / "report.html").read_text())
    assert not [tag for tag, attributes in tags.seen if any(key.startswith("on") for key in attributes)]
    assert not [tag for tag, attributes in tags.seen if attributes.get("src") == "x"]


def test_a_log_takes_names_of_any_bytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setup_console(is_main=True)
    add_rank_file(tmp_path, 0)
    try:
        logger.error("can't open %s", os.fsdecode(b"not \xff UTF-8"))
    finally:
        logger.handlers.pop().close()
        logger.handlers.clear()
    assert "can't open not \\udcff UTF-8" in (tmp_path / "logs" / "rank-0.log").read_text()
    out, err = capfd.readouterr()
    assert (out, err) == ("can't open not \\udcff UTF-8\n", "")
