"""Small runs: interrupted or refused, and the files that they leave."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.ranks import lines, rank, train
from tests.helpers.same_run import hashed, timeless

# In this process, or as the body of `run_ranks`.


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a run refuses its arguments."""
    assert train(args) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def refusal(args: list[str]) -> tuple[int, str]:
    """The exit status of a run and what it writes to standard error; for a rank."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = train(args)
    return status, said.getvalue()


def evaluated(args: list[str]) -> int:
    """`python -m distil_tl.evaluate` in this process; its exit status."""
    from distil_tl.evaluate import main

    return main(args)


def traced_train(args: list[str]) -> tuple[int, list[list[tuple[int, str]]]]:
    """The exit status, and for each training batch of this rank its images, `hashed`."""
    faults: Any = importlib.import_module("distil_tl.data.bad_images").BadImages
    seen: list[list[tuple[int, str]]] = []
    original = faults.check

    def read(self: Any, loader: Any, split: str, index: Any) -> Any:
        for batch in original(self, loader, split, index):
            if split == "train":
                seen.append(hashed(batch))
            yield batch

    faults.check = read
    return train(args), seen


def stopped_train(args: list[str], step: int, by: int, number: int) -> int:
    """Train, with a signal to rank `by` alone at a step. They exchange requests at each step, even if it is quick."""
    train_module: Any = importlib.import_module("distil_tl.train")
    importlib.import_module("distil_tl.distributed.preemption").EXCHANGE_SECONDS = 0.0  # type: ignore[attr-defined]
    original = train_module.optimizer_step
    taken = iter(range(1, 1000))

    def optimizer_step(*args: Any) -> None:
        original(*args)
        if next(taken) == step and rank() == by:
            os.kill(os.getpid(), number)

    train_module.optimizer_step = optimizer_step
    return train(args)


# The files that they leave.


def summary_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found


def losses(run_dir: Path, stage: str = "head") -> list[float]:
    return [line["loss"] for line in lines(run_dir, stage=stage)]


def same_result(run_dir: Path, reference: Path) -> None:
    """Byte-equal weights, and equal metrics but for times."""
    for name in ("last", "best"):
        one = load_file(run_dir / "checkpoints" / name / "weights.safetensors")
        two = load_file(reference / "checkpoints" / name / "weights.safetensors")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    found, expected = (timeless(lines(path, window="epoch")) for path in (run_dir, reference))
    assert found == expected
