"""Command line of the launchers: a training configuration with a `slurm` section beside it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.utils.args import apply, explain, is_file, overlay, parse_overrides, read_yaml, refuse, to_object
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import expand_home
from distil_tl.utils.paths import read_text
from distil_tl.utils.shipped import find_configuration
from launch.profile import find_profile
from launch.slurm_config import SlurmConfig

LONGEST_S = 30 * 86400.0
CLUSTERS = ("slurm", "local", "debug")
ASSUME_ENDED = "also submit what can't be checked, as on another cluster, because you know that it has ended"


def argument_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help also lists the keys of `slurm`."""
    keys = "\n".join(explain(SlurmConfig(), "slurm."))
    return argparse.ArgumentParser(
        program,
        usage=f"{program} [options] FILE.yaml [key=value ...] [slurm.key=value ...]",
        description=(doc or "").splitlines()[0],
        epilog=f"Slurm keys, their defaults and meanings:\n{keys}\n\nTraining keys: python -m distil_tl.train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that submit one job."""
    parser.add_argument(
        "--cluster", choices=CLUSTERS, default="slurm", help="local: processes of this machine; debug: this process"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, and submit nothing")
    parser.add_argument("--assume-ended", action="store_true", help=ASSUME_ENDED)
    add_submission_options(parser)


def add_submission_options(parser: argparse.ArgumentParser, *, parsable: bool = True) -> None:
    """Options of the commands that submit jobs."""
    if parsable:
        parser.add_argument(
            "--parsable", action="store_true", help="write only the job id to standard output, for scripts"
        )
    parser.add_argument(
        "--no-test", action="store_true", help="do not ask Slurm first whether it could ever run the job"
    )


def read_run(args: Sequence[str], unread: list[str] | None = None) -> tuple[Config, DictConfig, SlurmConfig]:
    """The run that `[CONFIG.yaml] [key=value ...] [slurm.key=value ...]` describes.

    Args:
        unread: gets the problems of keys and values that can't be read, which are left out; None: they are an error.

    Returns:
        The training configuration, the same with unresolved interpolations, and the `slurm` section.

    Raises:
        UserError: lists unknown keys and values of the wrong type.
    """
    pairs, rest = split_slurm(args)
    errors = []
    slurm = SlurmConfig()
    try:
        slurm = read_slurm(rest, pairs)
    except UserError as error:
        errors.append(str(error))
    # To find the default weights, `load` imports torch, which is not needed to report an error.
    weights = ["model.weights=none"] if errors and unread is None else []
    try:
        config, source = configuration.load([*rest, *weights], unread=unread)
        if unread is not None:
            unread += errors
            return config, source, slurm
    except UserError as error:
        errors.append(str(error))
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))
    return config, source, slurm


def read_slurm(args: Sequence[str], pairs: Sequence[str]) -> SlurmConfig:
    """The section of the file among the arguments, if there is one, overridden by `pairs`. Raises as `parse_slurm`."""
    files = [Path(arg) for arg in args if is_file(arg) and not arg.startswith("-")]
    return parse_slurm(load_slurm_section(files[0]) if files else None, pairs)


def split_slurm(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The `slurm.key=value` arguments, and all others."""
    pairs = [arg for arg in args if arg.startswith("slurm.") and "=" in arg]
    return pairs, [arg for arg in args if arg not in pairs]


class _TextLoader(yaml.SafeLoader):
    """A YAML loader that converts only null, true and false. YAML itself reads 24:00:00 as a number in base 60."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "bool", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_slurm_section(path: Path) -> Any:
    """The `slurm` section of a file, merged over that of its `base`. Numbers stay text, as in the file.

    Raises:
        UserError: the file can't be read.
    """
    read_yaml(path)  # raises for an unreadable file

    def section(path: Path) -> Any:
        tree = yaml.load(read_text(path, "the configuration"), _TextLoader)
        if not isinstance(tree, dict):  # empty
            return None
        base = tree.get("base")
        base = None if base is None else section(find_configuration(Path(str(base)), path.parent).resolve())
        own = tree.get("slurm")
        if isinstance(own, dict) and str(own.get("profile")).endswith((".yaml", ".yml")):
            own["profile"] = str(path.parent / expand_home(own["profile"]))
        return overlay(base, own) if isinstance(base, dict) and isinstance(own, dict) else tree.get("slurm", base)

    return section(find_configuration(path).resolve())


def parse_slurm(section: Any, pairs: Sequence[str]) -> SlurmConfig:
    """A file's `slurm` section over its profile, overridden by `slurm.key=value` arguments.

    Raises:
        UserError: lists unknown keys and values of the wrong type.
    """
    problems: list[str] = []
    schema = OmegaConf.create({"slurm": OmegaConf.structured(SlurmConfig)})
    if section is not None and not isinstance(section, dict):
        problems.append(f"`slurm` is a section: set `slurm.nodes=2` or another key of it, not {section!r}")
        section = None
    extra = {}
    for key, _, text in (pair.removeprefix("slurm.extra.").partition("=") for pair in pairs if _is_extra(pair)):
        extra[key] = {"true": True, "false": False, "null": None}.get(text, text)
    overrides = parse_overrides(schema, [pair for pair in pairs if not _is_extra(pair)], problems)
    tree = overlay(overlay({"slurm": section or {}}, overrides), {"slurm": {"extra": extra}} if extra else {})
    tree = _over_profile(tree, problems)
    words = tree["slurm"].get("srun_args")
    try:
        tree["slurm"] |= {"srun_args": shlex.split(words)} if isinstance(words, str) else {}
    except ValueError as error:
        problems.append(f"slurm.srun_args={words}: {error}")
    apply(schema, tree, "", problems)
    refuse(problems)
    config = to_object(schema.slurm)
    assert isinstance(config, SlurmConfig)
    return config


def _over_profile(tree: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The section over that of its profile, if it names one."""
    name = tree["slurm"].get("profile")
    if not isinstance(name, str) or name == "null":
        return tree
    try:
        section = load_slurm_section(find_profile(name))
    except UserError as error:
        problems.append(str(error))
        return tree
    if not isinstance(section, dict) or "profile" in section:
        why = "names another profile; use `base:`" if isinstance(section, dict) else "has no section `slurm` with keys"
        problems.append(f"slurm.profile={name}: the file {why}")
        return tree
    return overlay({"slurm": section}, tree)


def _is_extra(pair: str) -> bool:
    return pair.startswith("slurm.extra.")


def seconds(text: str) -> float:
    """A time from the command line: a number that `time.sleep` can wait for."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= LONGEST_S:  # also not a number
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, from 0 to {LONGEST_S:.0f}")
    return found


def print_line(text: str) -> None:
    """Write a line to standard output. Unlike a logger, it lets `run_command` end quietly when the pipe is closed."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def ids_only(wanted: bool) -> Iterator[Callable[[str], None]]:
    """With `wanted`, as with --parsable, all lines go to standard error, except what the yielded function writes."""
    if not wanted:
        yield lambda job_id: None
        return
    out = sys.stdout

    def print_id(job_id: str) -> None:
        out.write(job_id + "\n")
        out.flush()

    with redirect_stdout(sys.stderr):
        yield print_id
