"""best.yaml: the configuration of a run that begins with the chosen backbone and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import yaml

from distil_tl.models.names import BUILT_HEADS
from distil_tl.selection.cells import Result
from distil_tl.selection.config import trains_head
from distil_tl.training.config import StageConfig
from distil_tl.training.heads.config import FITTED_HEADS, network_head_problems
from distil_tl.utils.args import flatten

RESOLVED_WEIGHTS = ("package", "default")  # what `auto` became on this machine
_OWN = (
    "run_dir", "resume", "recipe", "model.name", "model.weights", "model.readout", "data.image_size", "data.crop_mode"
)  # fmt: skip


def best_config(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    stages: Mapping[str, StageConfig],
    head: tuple[str, StageConfig],
    result: Result,
) -> dict[str, Any]:
    """The settings that differ from the defaults, and what was chosen: the first stage.

    Args:
        given, defaults: configurations as nested dicts, with interpolations unresolved.
        stages: of the configuration.
        head: name and settings of the stage whose heads were compared.
    """
    before = flatten({key: value for key, value in defaults.items() if key != "stages"})
    now = flatten({key: value for key, value in given.items() if key != "stages"})
    kept = {key: value for key, value in now.items() if key not in _OWN and value != before.get(key)}
    kept["data.root"] = now["data.root"]
    kept |= {"data.image_size": result.cell.image_size, "data.crop_mode": result.cell.crop_mode}
    kept["model.name"] = result.cell.name
    if result.cell.readout != "pooled":
        kept["model.readout"] = result.cell.readout
    if now["model.weights"] not in RESOLVED_WEIGHTS:
        kept["model.weights"] = now["model.weights"]
    tree = _nested(kept)
    name, stage = head
    if result.kind in FITTED_HEADS:
        plain = StageConfig()  # it takes no steps, so keys that concern them are refused
        stage = replace(
            stage, head=result.kind, search=plain.search, epochs=plain.epochs, lr=plain.lr, views=plain.views,
            patience=plain.patience, ema=plain.ema, wise_ft=plain.wise_ft, distill=plain.distill,
        )  # fmt: skip
    first = _differing(stage)
    if result.kind == "linear":
        first |= {
            "lr": result.head["lr"],
            "search": {"weight_decay": [result.head["weight_decay"]]},  # of this stage alone
        }
    others = later_stages(stages)
    if list(network_head_problems({name: stage, **others})):
        others = {key: _with_head(other, stage.head) for key, other in others.items()}
    tree["stages"] = {name: first, **{key: _differing(other) for key, other in others.items()}}
    return tree


def later_stages(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """Those after the one whose heads are compared: all, if the first one does not train the head alone."""
    first = next(iter(stages))
    return {name: stage for name, stage in stages.items() if name != first or not trains_head(stage)}


def _with_head(stage: StageConfig, kind: str) -> StageConfig:
    """A later stage of a network with this kind of head: if it fits or searches its head, as it can be done there."""
    search = StageConfig().search if kind in BUILT_HEADS else stage.search
    return replace(stage, search=search, head=kind if stage.fits_head else stage.head)


def to_text(tree: Mapping[str, Any], header: str) -> str:
    """As YAML, below a comment."""
    comment = "".join(f"# {line}\n" if line else "#\n" for line in header.splitlines())
    return f"{comment}\n{yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)}"


def _differing(stage: StageConfig) -> dict[str, Any]:
    """What a stage trains, and its settings that differ from the defaults of a stage."""
    before = flatten(asdict(StageConfig()))
    kept = {key: value for key, value in flatten(asdict(stage)).items() if value != before.get(key)}
    return {"unfreeze": stage.unfreeze, **_nested(kept)}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of values by dotted key."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
