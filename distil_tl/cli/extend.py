"""`distil-tl extend RUN_DIR stages.full.epochs=+3`: train a run further, in a new stage."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distil_tl.data.config import ALL_EXTENSIONS
from distil_tl.report.load import integer, mapping
from distil_tl.utils.args import overlay, parse_overrides, read_yaml, refuse
from distil_tl.utils.command import exit_process, run_command
from distil_tl.utils.errors import UserError, did_you_mean
from distil_tl.utils.home import path_argument
from distil_tl.utils.outputs import check_output, open_output
from distil_tl.utils.run_folders import refuse_other_than_run

_MORE = re.compile(r"stages\.([\w-]+)\.epochs=\+(\d+)")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl extend",
        description="Train a run further: a new stage with the settings of an earlier one, from the last checkpoint. "
        "The learning rate warms up and decays again. The new stage is recorded in config.yaml like the others. Under "
        "torchrun: torchrun ... -m distil_tl extend ...",
        epilog="Further arguments change the new stage (stages.full.lr=1e-4), or settings that may change when a run "
        "is resumed (data.workers=4).",
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="a run directory")
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="stages.NAME.epochs=+N, and others")
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="only write the configuration, to submit it"
    )
    options = parser.parse_intermixed_args(args)
    return run_command("distil-tl extend", lambda: run(options.run_dir, options.overrides, options.config))


def run(run_dir: Path, overrides: Sequence[str], config_file: Path | None) -> None:
    """Train the extended run, or write its configuration to `config_file`.

    Raises:
        UserError: no such run or stage, arguments that can't be read, or what training refuses.
    """
    tree, pairs = extended(run_dir, overrides)
    content = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if config_file is not None:
        check_output("--config", config_file, [run_dir / "config.yaml"], ALL_EXTENSIONS, earlier=())
        with open_output(config_file) as file:
            file.write(content)
        sys.stdout.write(f"{config_file}: submit it with distil-tl submit {shlex.join([str(config_file), *pairs])}\n")
        return
    from distil_tl import config as configuration

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(content, encoding="utf-8")
        config = configuration.load([str(path), *pairs], saved=True)
    from distil_tl.train import train

    train(*config)


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
    found = _search_result(mapping(done, name), mapping(tree, "optim"))
    added = {**stages[name], "search": {}, **found, **changes, "epochs": epochs}
    last = list(stages)[-1]
    is_same = last.startswith(f"{name}_") and stages[last] == overlay(stages[last], added)
    state = mapping(done, last)
    is_done = (integer(state.get("epochs")) or 0) >= epochs or bool(state.get("stopped_early", False))
    if not is_same or is_done:
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
        state = json.loads((run_dir / "checkpoints" / "last" / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mapping(mapping(state, "run"), "stages") if isinstance(state, dict) else {}


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
