"""Start of the commands: --help and wrong arguments need no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import ROOT

HEAVY = ("torch", "torchvision", "timm", "numpy", "submitit", "optuna", "wandb")
# `python -m launch.NAME ARGS` for each call, all in one process. Prints the exit status and the heavy packages loaded.
CALLS = """
import json, runpy, sys
calls, heavy = map(json.loads, sys.argv[1:])
for name, *args in calls:
    sys.argv[1:] = args
    try:
        runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
    loaded = [package for package in heavy if package in sys.modules]
    print("RESULT", json.dumps([name, args, status, loaded]))
"""


def after(calls: list[list[str]], folder: Path) -> list[list[object]]:
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls), json.dumps(HEAVY)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


def test_help_and_wrong_arguments_are_answered_before_heavy_packages_are_imported(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("{random: {optim.name: {choice: [sgd, adamw]}}, count: 2}")
    names = ("submit", "sweep", "adaptive", "status", "sync", "task", "cancel", "logs")
    helps = [[name, "--help"] for name in names]
    wrong = [
        ["submit", "data.root=null", "optim.nam=sgd"],
        ["submit", "data.root=null", "slurm.nods=2"],
        ["submit", "nowhere.yaml"],
        ["sweep", "sweep.yaml", "data.root=null", "optim.nam=sgd"],
        ["sweep", "nowhere.yaml"],
        ["sweep", "sweep.yaml", "--frobnicate"],
        ["adaptive", "sweep.yaml", "data.root=null", "optim.nam=sgd"],
        ["adaptive", "sweep.yaml", "--trials=0"],
        ["status", "nowhere"],
        ["status"],
        ["cancel", "nowhere"],
        ["logs", "nowhere"],
        ["logs", ".", "--rank=one"],
        ["sync", "nowhere"],
        ["task", "data.root=null", "optim.nam=sgd"],
    ]
    assert after(helps, tmp_path) == [[name, args, 0, []] for name, *args in helps]
    assert after(wrong, tmp_path) == [[name, args, 2, []] for name, *args in wrong]
