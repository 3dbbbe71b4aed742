"""The command line of the launchers: a training configuration, with a `slurm` section beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.utils.args import apply, is_file, overlay, parse_overrides, read_yaml, refuse, to_object
from distil_tl.utils.errors import UserError
from launch.slurm_config import SlurmConfig


def argument_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """A command's parser, whose help explains the keys of `slurm` too."""
    keys = "\n".join(configuration.explain(SlurmConfig(), "slurm."))
    return argparse.ArgumentParser(
        program,
        usage=f"{program} [options] FILE.yaml [key=value ...] [slurm.key=value ...]",
        description=(doc or "").splitlines()[0],
        epilog=f"keys of slurm:\n{keys}\n\nThe others: python -m distil_tl.train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def read(args: Sequence[str]) -> tuple[Config, DictConfig, SlurmConfig]:
    """What `[CONFIG.yaml] [key=value ...]` means, `slurm.key=value` among them, of both a file and the command line.

    Raises:
        UserError: listing what is unknown or of the wrong type.
    """
    pairs, rest = split(args)
    files = [Path(arg) for arg in rest if is_file(arg) and not arg.startswith("-")]
    wrong = []
    try:
        slurm = read_slurm(slurm_section(files[0]) if files else None, pairs)
    except UserError as error:
        wrong.append(str(error))
    try:
        config, source = configuration.load(rest)
    except UserError as error:
        wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))
    return config, source, slurm


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """`slurm.key=value` arguments, and the others."""
    pairs = [arg for arg in args if arg.startswith("slurm.") and "=" in arg]
    return pairs, [arg for arg in args if arg not in pairs]


class _AsWritten(yaml.SafeLoader):
    """Takes nothing but null, true and false for more than text: to YAML 24:00:00 is a number of base 60."""


_AsWritten.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("null", "bool", "merge")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def slurm_section(path: Path) -> Any:
    """The `slurm` section of a file, over that of its `base`; numbers are text, as they were written."""
    read_yaml(path, ())  # refuses what can't be read

    def section(path: Path) -> Any:
        tree = yaml.load(path.read_text(), _AsWritten)
        below = section((path.parent / tree["base"]).resolve()) if tree.get("base") is not None else None
        if isinstance(below, dict) and isinstance(tree.get("slurm"), dict):
            return overlay(below, tree["slurm"])
        return tree.get("slurm", below)

    return section(path.resolve())


def read_slurm(tree: Any, pairs: Sequence[str]) -> SlurmConfig:
    """A file's `slurm` section with `slurm.key=value` over it."""
    problems: list[str] = []
    schema = OmegaConf.create({"slurm": OmegaConf.structured(SlurmConfig)})
    if tree is not None and not isinstance(tree, dict):
        problems.append(f"`slurm` holds keys of its own, as in `slurm.nodes=2`, not {tree!r}")
        tree = None
    extra = {}
    for key, _, text in (pair.removeprefix("slurm.extra.").partition("=") for pair in pairs if _is_extra(pair)):
        extra[key] = {"true": True, "false": False, "null": None}.get(text, text)
    overrides = parse_overrides(schema, [pair for pair in pairs if not _is_extra(pair)], problems)
    given = overlay(overlay({"slurm": tree or {}}, overrides), {"slurm": {"extra": extra}} if extra else {})
    apply(schema, given, "", problems)
    refuse(problems)
    found = to_object(schema.slurm)
    assert isinstance(found, SlurmConfig)
    return found


def _is_extra(pair: str) -> bool:
    return pair.startswith("slurm.extra.")


def say(text: str) -> None:
    """A line on standard output; unlike a logger's, it ends the command quietly when its reader has gone."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
