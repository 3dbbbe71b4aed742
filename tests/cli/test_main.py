"""The `distil-tl` command: it finds its commands, and reads arguments before it imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distil_tl.cli.main import COMMANDS, main
from tests.helpers.arguments import small_args
from tests.helpers.paths import ROOT
from tests.helpers.ranks import train
from tests.helpers.trained import make_run

HEAVY = ("torch", "torchvision", "timm", "PIL", "numpy", "wandb")

# Runs in a fresh interpreter, and writes which of the heavy modules each command line has imported.
SCRIPT = """
import contextlib, io, json, sys
heavy, command_lines = json.loads(sys.argv[1])
import distil_tl
from distil_tl.cli.main import main
imported = {"import distil_tl": [[name for name in heavy if name in sys.modules], None]}
for words in command_lines:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as error:
            status = error.code
    imported[" ".join(words)] = [[name for name in heavy if name in sys.modules], status]
print(json.dumps(imported))
"""


def test_help_and_refusals_import_no_torch() -> None:
    refused = {
        "nosuch": 2,
        "predict --nosuch": 2,
        "predict RUN_DIR": 2,
        "predict RUN_DIR x.png --batch-size 0": 2,
        "prepare --nosuch": 2,
        "prepare ROOT --out DIR --resize 7": 2,
        "report --nosuch": 2,
        "report nowhere": 2,
        "prefetch --nosuch": 2,
        "doctor --nosuch": 2,
        "prefetch optim.nam=sgd": 2,
        "models mobilenet_v3_small": 0,
        "models nosuch": 2,
        "train --nosuch": 2,
        "train optim.nam=sgd": 2,
        "evaluate --nosuch": 2,
    }
    expected = {
        "--help": 0,
        "--version": 0,
        **{f"{name} --help": 0 for name in COMMANDS},
        **refused,
    }
    arguments = json.dumps([HEAVY, [line.split() for line in expected]])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout)
    assert {line: modules for line, (modules, _) in imported.items() if modules} == {}
    assert {line: status for line, (_, status) in imported.items() if line in expected} == expected


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    words = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == words
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name:<10} {summary}\n" in words


@pytest.mark.parametrize(
    "line", ["predict RUN x.png", "prepare ROOT --out DIR", "compare A B", "export RUN -o x.onnx", "soup A -o B"]
)
def test_commands_that_divide_no_work_refuse_several_processes(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    command, *arguments = line.split()
    assert main([command, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"distil-tl {command}: distil-tl {command} runs as one process, and srun started 8: ")


def test_messages_begin_with_the_command_that_was_typed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those about what is found after the arguments are read."""
    args = [*small_args(folder), "model.weights=nowhere.pth", f"run_dir={tmp_path}/run"]
    assert main(["train", *args]) == 2
    assert capsys.readouterr().err.startswith("distil-tl train: model.weights: there is no file nowhere.pth")
    assert train(args) == 2
    assert capsys.readouterr().err.startswith("distil_tl.train: model.weights: ")
    run = make_run(tmp_path / "run", folder, 0)
    assert main(["evaluate", str(run), "--checkpoint", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"distil-tl evaluate: {run} has no checkpoint 'x'")


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute"]) == 2
    assert capsys.readouterr().err == "distil-tl: unknown command `evalute`, did you mean `evaluate`?\n"
    assert main(["xyz"]) == 2
    assert "the commands are train, evaluate, predict" in capsys.readouterr().err


def test_the_module_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distil_tl.cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("distil_tl ")
