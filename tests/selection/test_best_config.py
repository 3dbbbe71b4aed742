"""`train` accepts best.yaml for any settings of the first stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_tl.config import Config, load
from distil_tl.selection.best_config import best_config, to_text
from distil_tl.selection.cells import Cell, Result
from distil_tl.selection.config import head_stage
from distil_tl.training.config import DistillConfig, StageConfig
from distil_tl.utils.args import plain


@pytest.mark.parametrize("other", [{"patience": 2}, {"ema": 0.9}, {"wise_ft": True}, {"views": 2}, {}])
def test_a_fitted_head_has_no_keys_of_steps(tmp_path: Path, other: dict[str, object]) -> None:
    distill = DistillConfig() if other else DistillConfig(teacher="runs/teacher")
    stages = {"head": StageConfig(unfreeze="head", distill=distill, **other)}  # type: ignore[arg-type]
    result = Result(Cell("resnet18", "none", 32, "squash", 10, 10), "none", 10, {}, [], "fp32", 8, None, 1.0, "ridge")
    _, defaults = load(["data.root=x"])
    tree = best_config(plain(defaults), plain(defaults), stages, head_stage(stages), result)
    (tmp_path / "best.yaml").write_text(to_text(tree, "Chosen."))
    config: Config = load([str(tmp_path / "best.yaml")])[0]
    assert config.stages["head"].head == "ridge"
    assert config.stages["head"].problems("head") == []
