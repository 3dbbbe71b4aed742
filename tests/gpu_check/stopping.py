"""The step that stops a run in its last stage and resumes it, beside one that is not interrupted."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

import torch
from safetensors.torch import load_file

from tests.gpu_check.check import Check, completed, expect, run, train
from tests.helpers.ranks import lines
from tests.helpers.same_run import timeless

STEP = 3  # of the last stage, after which the signal comes
EXACT = ("step", "epoch", "stage", "split", "lr", "samples_seen")


def train_with_signal(args: list[str]) -> int:
    """Train, with SIGTERM to this process after a step of the stage `full`."""
    module: Any = importlib.import_module("distil_tl.train")
    original, count = module.optimizer_step, iter(range(1, 1_000_000))

    def optimizer_step(training: Any, *more: Any) -> None:
        original(training, *more)
        if training.stage.name == "full" and next(count) == STEP:
            os.kill(os.getpid(), signal.SIGTERM)

    module.optimizer_step = optimizer_step
    return train(args)


def stop_and_resume(check: Check, figures: dict[str, Any]) -> str:
    """As by default the weights may differ a little. With `deterministic=true` they must be byte-equal."""
    found = []
    if not check.dry:  # a CPU repeats its results in any case
        figures["default"] = interrupted(check, "default", "deterministic=false")
        found.append(f"default: weights {'byte-equal' if figures['default']['byte_equal'] else 'differ'}")
    # Every operation of a MobileNetV2 has an algorithm that repeats bit by bit.
    network = [] if check.dry else ["model.name=mobilenet_v2"]
    figures["deterministic"] = result = interrupted(check, "deterministic", "deterministic=true", *network)
    expect(result["byte_equal"], f"deterministic=true: other weights, losses differ by {result['difference']:.2g}")
    return "; ".join(["status 3, resumed", *found, "deterministic: weights byte-equal"])


def interrupted(check: Check, name: str, *more: str) -> dict[str, Any]:
    """Whether an interrupted run has the weights of one that was not, and the largest difference of their losses."""
    names = (f"{name}-whole", f"{name}-stopped")
    completed(check, names[0], *more)
    status, _ = run(check, names[1], *more, body=train_with_signal)
    expect(status == 3, f"SIGTERM ended the run with status {status}, not 3")
    completed(check, names[1], *more)
    one, two = (timeless(lines(check.run_dir(each), window="epoch")) for each in names)
    expect(bool(one), "no lines of metrics")
    expect([[a[k] for k in EXACT] for a in one] == [[b[k] for k in EXACT] for b in two], "other steps or rates")
    difference = max(abs(a["loss"] - b["loss"]) / max(a["loss"], 1e-9) for a, b in zip(one, two, strict=True))
    expect(difference < 0.05, f"losses differ by {difference:.2g}")
    mine, theirs = (load_file(check.run_dir(each) / "checkpoints/last/weights.safetensors") for each in names)
    equal = mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())
    return {"byte_equal": equal, "difference": difference}
