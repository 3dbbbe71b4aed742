"""The console script: `distil-tl COMMAND ...`. The same without it: `python -m distil_tl COMMAND ...`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from distil_tl.utils.command import exit_process, run_command
from distil_tl.utils.errors import EXIT_USER_ERROR, UserError, did_you_mean
from distil_tl.utils.version import __version__

# For each command: the module whose `main` runs it, imported only for that command, and its line in --help.
COMMANDS = {
    "train": ("distil_tl.train", "train a model in stages (same as python -m distil_tl.train)"),
    "evaluate": ("distil_tl.evaluate", "exact metrics of a checkpoint, on any number of ranks"),
    "predict": ("distil_tl.cli.predict", "predict the classes of image files and folders, as CSV"),
    "export": ("distil_tl.cli.export", "write a trained model as ONNX, or as timm and torchvision load it"),
    "prepare": ("distil_tl.cli.prepare", "copy images with a permanent split, and large ones made smaller if asked"),
    "select": ("distil_tl.cli.select", "compare backbones, image sizes and crops by their accuracy on your images"),
    "prefetch": ("distil_tl.cli.prefetch", "download and check pretrained weights before a job without network"),
    "models": ("distil_tl.cli.models", "list the models that can be used, with their sizes"),
    "doctor": ("distil_tl.cli.doctor", "check what a run will use on this machine, and what will fail"),
    "report": ("distil_tl.report", "write a run's report.html, one self-contained file"),
    "compare": ("distil_tl.cli.compare", "compare two runs on the same images"),
    "soup": ("distil_tl.cli.soup", "average checkpoints of one or several runs, where that is better on val"),
    "extend": ("distil_tl.cli.extend", "train a run further, in a new stage"),
    "distil": ("distil_tl.cli.distil", "train another model as a student of a finished run"),
    "init": ("distil_tl.cli.init", "copy a configuration, sweep file or batch script that comes with the package"),
    "submit": ("launch.submit", "submit a run to Slurm (same as python -m launch.submit)"),
    "sweep": ("launch.sweep", "submit the trials of a sweep file"),
    "adaptive": ("launch.adaptive", "search settings with Optuna, in Slurm jobs"),
    "status": ("launch.status", "show the status of runs and sweeps"),
    "logs": ("launch.logs", "show the output of a run's job"),
    "cancel": ("launch.cancel", "cancel the jobs of a run or sweep"),
    "sync": ("launch.sync", "send runs to Weights & Biases, from a machine with network"),
}


def main(args: Sequence[str] | None = None) -> int:
    if args is None:
        exit_process(run_command("distil-tl", lambda: flushed(run(sys.argv[1:]))))  # also when an abandoned call runs
    return run(args)


def flushed(status: int) -> int:
    """`status`, after output is written: an error because its reader has exited, such as `head`, comes now."""
    sys.stdout.flush()
    return status


def run(argv: Sequence[str]) -> int:
    """Run a command with its arguments. Returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"distil_tl {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        print(f"distil-tl: unknown command `{name}`{hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    module, _ = COMMANDS[name]
    if name == "select" and "--submit" in rest:
        module = "launch.select"
    if module.startswith("launch."):
        import_own_launch()
    check_arguments(name, rest)
    command = importlib.import_module(module).main
    # These are modules that are started as such, too. Messages begin with what the user typed.
    status: int = command(rest, f"distil-tl {name}") if name in ("train", "evaluate") else command(rest)
    return status


def import_own_launch() -> None:
    """Import the package `launch` beside this one, also in a folder that has a `launch` of its own."""
    root = Path(__file__).resolve().parents[2]
    found = PathFinder.find_spec("launch", [str(root)])
    if found is None or found.loader is None:
        raise UserError(f"the package launch is not in {root}, beside distil_tl: install distil_tl again")
    if getattr(sys.modules.get("launch"), "__file__", None) != found.origin:
        module = sys.modules["launch"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)


def check_arguments(command: str, args: list[str]) -> None:
    """For the commands whose modules import torch: print help, or refuse wrong arguments, and exit."""
    if command not in ("train", "evaluate"):
        return
    from distil_tl import arguments  # OmegaConf: not needed for the other commands

    if command == "train":
        arguments.check_arguments("distil-tl train", args)
    else:
        arguments.check_evaluation_arguments(args, "distil-tl evaluate")


def usage() -> str:
    lines = [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: distil-tl COMMAND ...", "", *lines, "", "`distil-tl COMMAND --help` shows the arguments of a command."]
    )
