"""The command line of the launchers: a training configuration, with a `slurm` section beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.settings import apply, is_file, overlay, parse_overrides, read_yaml, refuse, to_object
from launch.resources import SlurmConfig


def read(args: Sequence[str]) -> tuple[Config, DictConfig, SlurmConfig]:
    """What `[CONFIG.yaml] [key=value ...]` means, `slurm.key=value` among them, of both a file and the command line.

    Raises:
        UserError: listing what is unknown or of the wrong type.
    """
    pairs, rest = split(args)
    files = [Path(arg) for arg in rest if is_file(arg)]
    slurm = read_slurm(read_yaml(files[0], ()).get("slurm") if files else None, pairs)
    config, source = configuration.load(rest)
    return config, source, slurm


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """`slurm.key=value` arguments, and the others."""
    pairs = [arg for arg in args if arg.startswith("slurm.") and "=" in arg]
    return pairs, [arg for arg in args if arg not in pairs]


def read_slurm(tree: Any, pairs: Sequence[str]) -> SlurmConfig:
    """A file's `slurm` section with `slurm.key=value` over it."""
    problems: list[str] = []
    schema = OmegaConf.create({"slurm": OmegaConf.structured(SlurmConfig)})
    if tree is not None and not isinstance(tree, dict):
        problems.append(f"`slurm` holds keys of its own, as in `slurm.nodes=2`, not {tree!r}")
        tree = None
    apply(schema, overlay({"slurm": tree or {}}, parse_overrides(schema, list(pairs), problems)), "", problems)
    refuse(problems)
    found = to_object(schema.slurm)
    assert isinstance(found, SlurmConfig)
    return found
