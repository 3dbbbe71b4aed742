"""`train` accepts best.yaml for any settings of the first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distil_tl.config import Config, load
from distil_tl.selection.best_config import best_config, to_text
from distil_tl.selection.cells import Cell, Result
from distil_tl.selection.config import head_stage
from distil_tl.training.config import DistillConfig, SearchConfig, StageConfig
from distil_tl.utils.args import plain


def tree_of(stages: dict[str, StageConfig], kind: str, **head: float) -> dict[str, Any]:
    cell = Cell("resnet18", "none", 32, "squash", 10, 10)
    result = Result(cell, "none", 10, head, [], "fp32", 8, None, 1.0, kind)
    _, defaults = load(["data.root=x"])
    return best_config(plain(defaults), plain(defaults), stages, head_stage(stages), result)


@pytest.mark.parametrize("other", [{"patience": 2}, {"ema": 0.9}, {"wise_ft": True}, {"views": 2}, {}])
def test_a_fitted_head_has_no_keys_of_steps(tmp_path: Path, other: dict[str, object]) -> None:
    distill = DistillConfig() if other else DistillConfig(teacher="runs/teacher")
    stages = {"head": StageConfig(unfreeze="head", distill=distill, **other)}  # type: ignore[arg-type]
    tree = tree_of(stages, "ridge")
    (tmp_path / "best.yaml").write_text(to_text(tree, "Chosen."))
    config: Config = load([str(tmp_path / "best.yaml")])[0]
    assert config.stages["head"].head == "ridge"
    assert config.stages["head"].problems("head") == []


@pytest.mark.parametrize(
    ("kind", "later", "becomes"),
    [
        ("mlp", StageConfig(unfreeze="head", head="ridge"), ("mlp", False)),
        ("mlp", StageConfig(unfreeze="head", search=SearchConfig([0.1])), ("linear", False)),
        ("cosine", StageConfig(unfreeze="head", head="mlp"), ("cosine", False)),
        ("ridge", StageConfig(unfreeze="head", head="mlp"), ("ridge", False)),
        ("linear", StageConfig(unfreeze="head", head="mlp"), ("linear", False)),
        ("ridge", StageConfig(unfreeze="head", head="lda"), ("lda", False)),
        ("ridge", StageConfig(unfreeze="head", search=SearchConfig([0.1])), ("linear", True)),
    ],
)
def test_a_later_stage_that_fits_its_head_goes_with_the_one_that_was_chosen(
    tmp_path: Path, kind: str, later: StageConfig, becomes: tuple[str, bool]
) -> None:
    stages = {"head": StageConfig(unfreeze="head"), "later": later}
    tree = tree_of(stages, kind, lr=0.1, weight_decay=0.1)
    (tmp_path / "best.yaml").write_text(to_text(tree, "Chosen."))
    stage = load([str(tmp_path / "best.yaml")])[0].stages["later"]
    assert (stage.head, stage.search.wanted) == becomes
