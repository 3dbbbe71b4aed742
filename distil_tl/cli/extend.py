"""`distil-tl extend RUN_DIR stages.full.epochs=+3`: train a run further, in a new stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_tl.cli.derived_run import read_arguments, train_derived
from distil_tl.report.load import integer, mapping
from distil_tl.utils.args import overlay, parse_overrides, read_yaml, refuse
from distil_tl.utils.auto import AUTO
from distil_tl.utils.command import exit_process, run_command
from distil_tl.utils.errors import UserError, did_you_mean
from distil_tl.utils.files import read_json
from distil_tl.utils.run_folders import refuse_other_than_run

_MORE = re.compile(r"stages\.([\w-]+)\.epochs=\+(\d+)")


def main(args: Sequence[str] | None = None) -> int:
    options = read_arguments(
        args,
        "distil-tl extend",
        "Train a run further: a new stage with the settings of an earlier one, from the last checkpoint. The learning "
        "rate warms up and decays again. The new stage is recorded in config.yaml like the others.",
        "the new stage (stages.full.lr=1e-4), or settings that may change when a run is resumed (data.workers=4)",
        run_dir="a run directory",
        needed="stages.NAME.epochs=+N",
    )
    return run_command("distil-tl extend", lambda: run(options.run_dir, options.overrides, options.config))


def run(run_dir: Path, overrides: Sequence[str], config_file: Path | None) -> None:
    """Train the extended run, or write its configuration to `config_file`.

    Raises:
        UserError: no such run or stage, arguments that can't be read, or what training refuses.
    """
    tree, pairs = extended(run_dir, overrides)
    train_derived(tree, pairs, run_dir, config_file)


def extended(run_dir: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The run's configuration with the new stage, and the arguments that are not about that stage.

    If the last stage is the one that these arguments describe, and is not complete, it is resumed: so the same command
    continues an interrupted extension.

    Raises:
        UserError: no such run or stage, not exactly one `stages.NAME.epochs=+N`, or arguments that name another run.
    """
    refuse_other_than_run(run_dir)
    name, epochs = _wanted(overrides)
    tree, done = read_yaml(run_dir / "config.yaml"), _stages_done(run_dir)
    stages = mapping(tree, "stages")
    if not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        raise UserError(f"{run_dir}/config.yaml has no stages that can be read: restore it")
    if name not in stages:
        hint = did_you_mean(name, stages) or f"; its stages are {', '.join(stages)}"
        raise UserError(f"{run_dir} has no stage {name}{hint}")
    prefix = f"stages.{name}."
    own = [argument.removeprefix(prefix) for argument in overrides if argument.startswith(prefix)]
    changes = _values([argument for argument in own if not argument.startswith("epochs=")])
    record = mapping(done, name)
    fitted = {"head": "linear"} if stages[name].get("head", "linear") != "linear" else {}
    found = {**_auto_result(stages[name], record), **_search_result(record, mapping(tree, "optim"))}
    added = {**stages[name], "search": {}, **fitted, **found, **changes, "epochs": epochs}
    last = list(stages)[-1]
    is_same = last.startswith(f"{name}_") and stages[last] == overlay(stages[last], added)
    state = mapping(done, last)
    has_trained = (integer(state.get("epochs")) or 0) >= epochs or bool(state.get("stopped_early", False))
    interpolates = stages[last].get("wise_ft") and state.get("wise_ft") is None  # still, after its last epoch
    if not is_same or (has_trained and not interpolates):
        stages[_free_name(name, stages)] = added
    tree["run_dir"] = str(run_dir)
    if tree.get("max_minutes") is not None:  # the run has used them up
        tree["max_minutes"] = None
    return tree, [argument for argument in overrides if not argument.startswith(prefix)]


def _wanted(overrides: Sequence[str]) -> tuple[str, int]:
    """The stage to continue, and for how many epochs."""
    for argument in overrides:
        if argument.startswith(("run_dir=", "resume=")):
            raise UserError(f"{argument}: the run to extend is RUN_DIR, and stays where it is; remove it")
    given = [argument for argument in overrides if re.fullmatch(r"stages\.[^.=]*\.epochs=.*", argument)]
    wanted = [found for argument in given if (found := _MORE.fullmatch(argument))]
    if len(given) != 1 or not wanted or int(wanted[0][2]) == 0:
        raise UserError("say once which stage to continue, and for how many epochs, as in stages.full.epochs=+3")
    return wanted[0][1], int(wanted[0][2])


def _stages_done(run_dir: Path) -> dict[str, Any]:
    """What the last checkpoint says of each stage; empty without one."""
    try:
        state = read_json(run_dir / "checkpoints" / "last" / "state.json")
    except (OSError, ValueError):
        return {}
    return mapping(mapping(state, "run"), "stages") if isinstance(state, dict) else {}


def _auto_result(stage: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What `lr` and `layer_decay` were that are `auto`. The new stage has another before it, so `auto` could differ."""
    keys = [key for key in ("lr", "layer_decay") if stage.get(key) == AUTO]
    return {key: record[key] for key in keys if isinstance(record.get(key), float)}


def _search_result(record: dict[str, Any], optim: dict[str, Any]) -> dict[str, Any]:
    """The settings that a head search chose. Weight decay is no setting of a stage: it is the only candidate again."""
    result = mapping(record, "search")
    if not result.keys() >= {"lr", "weight_decay"}:
        return {}
    decay = result["weight_decay"]
    again = {} if decay == optim.get("weight_decay") else {"weight_decay": [decay]}
    return {"lr": result["lr"], "search": again}


def _free_name(name: str, stages: dict[str, Any]) -> str:
    return next(f"{name}_{number}" for number in range(2, len(stages) + 3) if f"{name}_{number}" not in stages)


def _values(pairs: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    problems: list[str] = []
    values = parse_overrides(OmegaConf.create(), pairs, problems)
    refuse(problems)
    return values


if __name__ == "__main__":
    exit_process(main())
