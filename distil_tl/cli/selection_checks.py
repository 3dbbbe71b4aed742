"""What `distil-tl select` refuses before any work: candidates, weights, and stages that best.yaml could not have."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distil_tl.config import Config, load
from distil_tl.models.config import ModelConfig
from distil_tl.selection.best_config import RESOLVED_WEIGHTS, best_config, to_text
from distil_tl.selection.candidates import Found, expand, locate
from distil_tl.selection.cells import Cell, Result
from distil_tl.selection.config import GridConfig, head_stage
from distil_tl.utils.args import plain
from distil_tl.utils.errors import UserError, listed


def named_models(grid: GridConfig, config: Config) -> tuple[list[str], ModelConfig]:
    """The names of the candidates, and the settings that they share. Raises UserError for unknown names."""
    weights = "auto" if config.model.weights in RESOLVED_WEIGHTS else config.model.weights
    names, model = expand(grid.candidates, pretrained=weights != "none"), replace(config.model, weights=weights)
    if model.path is not None and len(names) > 1:
        raise UserError(f"model.weights={model.weights} is of one model: give that one as candidates=[NAME]")
    return names, model


def without_models(config: Config) -> Config:
    """What is checked once: the models are checked one by one, and of the stages only that whose heads are compared."""
    model, stages = ModelConfig("resnet18", "none"), dict([head_stage(config.stages, config.data.augment)])
    data = config.data
    if not data.problems():
        data = replace(data, augment="none")  # the stage has its own; the other one is for later stages of best.yaml
    return replace(config, model=model, data=data, stages=stages, run_dir=None)


def find_models(grid: GridConfig, config: Config) -> Found:
    """Which candidates can be used on this machine. Raises UserError for unknown names."""
    return locate(*named_models(grid, config))


def refuse_none_usable(found: Found) -> None:
    """Raises UserError if there is no backbone to try, with the command that downloads weights."""
    if found.usable:
        return
    reasons = [f"{name}: {reason}" for name, reason in found.unusable.items()]
    if found.missing:
        reasons.append(
            f"the weights of {listed(list(found.missing), 8)} are not on this machine; run on one with network that "
            f"shares its caches:\n{prefetch_command(found.missing)}"
        )
    raise UserError(
        f"no backbone can be used: {'; '.join(reasons) or 'candidates has no model of an installed library'}"
    )


def example_of_best(config: Config, unresolved: DictConfig, model: ModelConfig) -> Config:
    """The configuration in best.yaml if `model` were chosen, so that later stages can be checked before any work."""
    cell = Cell(model.name, model.weights, 224, "squash", 0, 0)
    result = Result(cell, "", 1, {"lr": 1e-3, "weight_decay": 0.0}, [], "fp32", 1, None, 0.0)
    head = head_stage(config.stages, config.data.augment)
    tree = best_config(plain(unresolved), plain(OmegaConf.structured(Config)), config.stages, head, result)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.yaml"
        path.write_text(to_text(tree, ""), encoding="utf-8")
        return replace(load([str(path)])[0], run_dir=None)  # one that is not used, and depends on the model


def prefetch_command(missing: Collection[str]) -> str:
    """The shell command that downloads the weights of some models."""
    names = list(missing)
    if len(names) == 1:
        return f"  distil-tl prefetch model.name={shlex.quote(names[0])}"
    return f"  for name in {shlex.join(names)}; do distil-tl prefetch model.name=$name; done"
