"""The arguments of `distil-tl doctor`, read so that what is wrong with some does not hide the rest."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from distil_tl import config as configuration
from distil_tl.cli.doctor_plan import GROUP, Plan
from distil_tl.config import Config
from distil_tl.distributed.launch_env import Launch, read_launch
from distil_tl.doctor.lines import Report
from distil_tl.utils.args import is_file
from distil_tl.utils.errors import UserError
from distil_tl.utils.threads import CallTimeoutError, call_with_timeout


def launch_of(report: Report, environ: Mapping[str, str]) -> Launch:
    """The launch that the environment describes. What is wrong becomes a failing line."""
    try:
        return read_launch(environ)
    except UserError as error:
        report.fail("ranks", "environment", str(error))
        return Launch()


def plan_within(seconds: float, args: Sequence[str], report: Report, launch: Launch) -> Plan:
    """`read_plan`, or the demo if that takes too long: it looks at files, whose server may not answer."""
    found = Report()
    try:
        plan = call_with_timeout(seconds, lambda: read_plan(args, found, launch))
    except CallTimeoutError:
        config = configuration.load(["model.weights=none"])[0]
        plan = Plan(launch, f"distil-tl doctor: {' '.join(args)}", config, None, None)
        plan.failed["arguments"] = (
            f"reading the arguments and the files that they name did not end within {seconds:g} s; does the file "
            f"server of the configuration, data.root and run_dir answer?"
        )
        return plan
    report.lines += found.lines
    return plan


def read_plan(args: Sequence[str], report: Report, launch: Launch) -> Plan:
    """Read the arguments. What is wrong becomes failing lines, not an error."""
    launch_args = importlib.import_module("launch.args")  # by name: launch is above this package
    pairs, rest = launch_args.split_slurm(args)
    files = [arg for arg in rest if is_file(arg)]
    title = f"distil-tl doctor: {files[0] if files else 'the demo' if not rest else 'without a configuration file'}"
    unread: list[str] = []
    config: Config
    unresolved: DictConfig | None
    try:
        config, unresolved, slurm = launch_args.read_run(args, unread)
        for problem in unread:
            report.fail(GROUP, "arguments", problem)
        if unread:
            report.warn(GROUP, "arguments", "the rest is checked, with the defaults of these keys")
        given = bool(pairs) or (bool(files) and launch_args.load_slurm_section(Path(files[0])) is not None)
    except UserError as error:
        for problem in _separate(str(error)):
            report.fail(GROUP, "arguments", problem)
        report.warn(GROUP, "arguments", "the rest is checked with the defaults")
        config, unresolved, slurm, given = configuration.load(["model.weights=none"])[0], None, None, False
    plan = Plan(launch, title, config, unresolved, slurm if given else None, unread=unread)
    _ = plan.preprocess  # now, within the time limit: it looks at the file of the weights
    return plan


def _separate(message: str) -> list[str]:
    """The problems in the message of `utils.args.refuse`."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    return [line for line in lines if line and not line.endswith("problems:")]
