"""`distil-tl select [CONFIG.yaml] data.root=FOLDER [candidates=...] [sizes=...] [crops=...]`: which backbone to use."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distil_tl.config import Config, load
from distil_tl.data.config import data_name
from distil_tl.selection.config import (
    HEAD_EPOCHS,
    HEAD_LR,
    HEAD_WEIGHT_DECAY,
    GridConfig,
    read_budget,
    trains_head,
)
from distil_tl.training.heads.config import balance_problem
from distil_tl.utils.args import apply, explain, is_file, parse_overrides, read_yaml, refuse, to_object
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError, did_you_mean
from distil_tl.utils.home import path_argument

# The heads where the configuration defines no stages; its `key=value` arguments still change them.
HEADS = (
    f"stages.head.epochs={HEAD_EPOCHS}",
    f"stages.head.search.lr={list(HEAD_LR)}",
    f"stages.head.search.weight_decay={list(HEAD_WEIGHT_DECAY)}",
)
_KEYS = [key.name for key in fields(GridConfig)]
_OF_RUNS = {"model.name": "candidates", "data.image_size": "sizes"}  # keys of a run, of which a grid has several


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl select",
        usage="distil-tl select [CONFIG.yaml] [key=value ...] [--out DIR] [--budget TIME] [--submit]",
        description="Compare backbones, image sizes, crops and read-outs by the accuracy of heads on their features. "
        "Writes DIR/select.html and select.json, and DIR/best.yaml for distil_tl.train. The same command resumes.",
        epilog=help_of_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `distil-tl` must know --submit
    )
    add_options(parser)
    options, rest = parser.parse_known_args(args)
    return run_command("distil-tl select", lambda: run(rest, options.out, options.budget, submit=options.submit))


def help_of_keys() -> str:
    """The keys of the grid, for --help."""
    return "\n".join(["keys besides those of a run (distil-tl train --help):", *explain(GridConfig(), "")])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a selection, submitted or not."""
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="a folder (default: runs/select-DATA)")
    parser.add_argument(
        "--budget", metavar="TIME", help="as in 10m: begin no cell that would probably end later; the best first"
    )
    parser.add_argument(
        "--submit", action="store_true", help="as a job of Slurm, with slurm.key=value (--submit --help)"
    )


def options_of(out: Path, budget: str | None) -> list[str]:
    """The same as arguments."""
    return ["--out", str(out), *([] if budget is None else ["--budget", budget])]


def run(args: Sequence[str], out: Path | None, budget: str | None, *, submit: bool = False) -> None:
    """Read the arguments, then compare.

    Raises:
        UserError: wrong arguments, images that can't be used, no backbone that can be used, or no place for the files.
        PreemptedError: stopped by a signal; the same command resumes.
    """
    if submit:  # `distil-tl select --submit` does not come here
        raise UserError("this command does not submit jobs: start it as `distil-tl select --submit`")
    grid, config, unresolved = read(args)
    seconds = seconds_of(budget)
    if "huggingface_hub" not in sys.modules:  # weights are read from its cache, without asking a server
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from distil_tl.cli.selection import select  # imports torch

    select(grid, config, unresolved, out or default_folder(config), seconds)


def seconds_of(budget: str | None) -> float | None:
    """What --budget means. Raises UserError for another text."""
    try:
        return None if budget is None else read_budget(budget)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None


def default_folder(config: Config) -> Path:
    """The folder of the results, where none is given."""
    name = "digits" if config.data.root is None else data_name(Path(config.data.root))
    return Path("runs") / f"select-{name}"


def read(args: Sequence[str]) -> tuple[GridConfig, Config, DictConfig]:
    """The grid, and the configuration as `load` gives it. Raises UserError with all problems of the grid."""
    schema, problems = OmegaConf.structured(GridConfig), list[str]()
    own = [arg for arg in args if arg.partition("=")[0] in _KEYS and "=" in arg]
    apply(schema, parse_overrides(schema, own, problems), "", problems)
    refuse([*problems, *_misspelled(args)])
    grid: GridConfig = to_object(schema)
    refuse(list(grid.problems()))
    rest = [arg for arg in args if arg not in own]
    files = [arg for arg in rest if is_file(arg)]
    tree = read_yaml(Path(files[0])) if len(files) == 1 and not files[0].startswith("-") else {}
    has_stages = "stages" in tree or "recipe" in tree or any(arg.startswith("recipe=") for arg in rest)
    refuse(
        [f"{key} is no key of a configuration file: give {key}=... on the command line" for key in _KEYS if key in tree]
    )
    others = [arg for arg in rest if arg not in files]
    config, unresolved = load([*files, *([] if has_stages else HEADS), *others])
    name, first = next(iter(config.stages.items()))
    if not has_stages and not trains_head(first):  # the settings of HEADS are for a stage that trains the head alone
        config, unresolved = load([*files, *others])
    if first.fits_head:
        raise UserError(
            f"stages.{name}.head={first.head} is the head of a run; select compares kinds of heads on the same "
            f"features: give heads=[{first.head}] in place of it"
        )
    if trains_head(first) and first.ema is not None:
        raise UserError(
            f"stages.{name}.ema={first.ema}: heads are compared without an average, so the first stage of best.yaml "
            f"would differ from its figure; remove it"
        )
    refuse([problem] if (problem := balance_problem("heads", grid.heads, config.data.balance)) else [])
    return grid, config, unresolved


def _misspelled(args: Sequence[str]) -> Iterator[str]:
    """Problems of arguments that may be meant for the grid, or for a job."""
    known = {*_KEYS, *(key.name for key in fields(Config))}
    for key in dict.fromkeys(arg.partition("=")[0] for arg in args if "=" in arg and not arg.startswith("-")):
        if key.startswith("slurm."):
            yield f"{key} is of a job: add --submit"
        elif key in _OF_RUNS:
            yield f"{key} is of a run: give {_OF_RUNS[key]}=[...], with one value or several"
        elif "." not in key and key not in known and (hint := did_you_mean(key, known)):
            yield f"unknown key `{key}`{hint}"


if __name__ == "__main__":
    sys.exit(main())
