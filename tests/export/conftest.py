"""Run directories as training leaves them, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build
from distil_tl.rundir.checkpoint import Checkpoints
from tests.helpers.images import CLASSES

SIZE = 32


@pytest.fixture(scope="session")
def make_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a model and a read-out to a run with random weights: other ones in `best` than in `last`."""

    def make(name: str, readout: str = "pooled", size: int = SIZE) -> Path:
        path: Path = tmp_path_factory.mktemp("run")
        (path / "config.yaml").write_text(
            f"data: {{root: '{folder}', image_size: {size}, workers: 0}}\n"
            f"model: {{name: {name}, weights: none, readout: {readout}}}\nstages: {{head: {{unfreeze: head}}}}\n"
            "distributed: {device: cuda, backend: nccl}\n"
        )
        checkpoints = Checkpoints(path / "checkpoints")
        for step in (1, 2):
            model = build(ModelConfig(name, "none", readout=readout), len(CLASSES), image_size=size, seed=step)
            for head in model.heads:  # its weights are nearly zero at first, so that all classes are equally probable
                model.module.get_submodule(head).weight.data.mul_(30)  # type: ignore[operator]
            position = {"stage": "head", "epoch": step, "consumed": 0, "step": step}
            run = {"position": position, "stages": {"head": {}}, "final": {"step": step, "top1": 0.5}}
            state = {"classes": list(CLASSES), "preprocess": asdict(model.preprocess), "run": run}
            checkpoints.save(step, weights=model.module.state_dict(), train_state={}, state=state, is_best=step == 1)
        checkpoints.wait()
        return path

    return make
