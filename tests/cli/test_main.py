"""The `distil-tl` command: it finds its commands, and reads arguments before it imports torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from distil_tl.cli.main import COMMANDS, main
from tests.helpers.paths import ROOT

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
