"""Any command line of any command: refused in a sentence, or accepted, and never a traceback or a hang."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fuzz.arguments import ODD_FILES, Files, as_arguments, command_lines
from tests.fuzz.running import BOUND_S, End, Faults, explore, fault_of, replaced, run_main
from tests.helpers.arguments import WITHOUT_TIMM
from tests.helpers.fake_slurm import instead_of_slurm

LONG = pytest.mark.fuzz
PATHS = ("data.root", "run_dir", "resume", "data.stage_to")


@dataclass(frozen=True)
class Command:
    """A command to try.

    Attributes:
        begins: the functions with which its work begins.
        options: to try.
        sweep: whether it reads a sweep file.
        long: how many command lines the long test tries.
    """

    module: str
    begins: list[str]
    options: list[str] = field(default_factory=list)
    sweep: bool = False
    long: int = 3000

    @property
    def main(self) -> Callable[[list[str]], int]:
        found: Callable[[list[str]], int] = importlib.import_module(self.module).main
        return found


COMMANDS = {
    "train": Command("distil_tl.train", ["distil_tl.train.open_splits"], long=6000),
    "prefetch": Command(
        "distil_tl.cli.prefetch",
        ["distil_tl.cli.prefetch.fetch_weights", "distil_tl.data.digits.digits_folder"],
        ["--check", "--chec", "--nope"],
    ),
    "doctor": Command(
        "distil_tl.cli.doctor",
        ["distil_tl.doctor.facts.gather"],
        ["--json", "--timeout", "--timeout=nan", "--timeout=1"],
    ),
    "submit": Command(
        "launch.submit",
        ["launch.one_job.take_snapshot"],
        ["--dry-run", "--cluster=local", "--cluster", "--nope"],
        long=4000,
    ),
    "sweep": Command(
        "launch.sweep",
        ["launch.sweep.take_snapshot"],
        ["--dry-run", "--cluster=local", "--resubmit-failed", "--dir", "--dir=x", "--dir=/dev/null", "--nope"],
        sweep=True,
        long=2000,
    ),
    "adaptive": Command(
        "launch.adaptive",
        ["launch.adaptive.refuse_other_search"],
        ["--trials=3", "--trials=-1", "--parallel=0", "--poll=nan", "--poll=-1", "--dir=x", "--new-code", "--trials=x"],
        sweep=True,
        long=2000,
    ),
}
CASES = [
    pytest.param(name, examples, marks=marks)
    for name, command in COMMANDS.items()
    for examples, marks in ((8, ()), (command.long, LONG))
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A folder for configuration files; the current folder is an empty one, and Slurm a stand-in."""
    instead_of_slurm(tmp_path, monkeypatch)
    return Files(tmp_path / "files")


@pytest.mark.parametrize(("name", "examples"), CASES)
def test_a_command_line(name: str, examples: int, files: Files) -> None:
    command = COMMANDS[name]

    def body(line: list[str | bytes]) -> tuple[End, str, object]:
        args = as_arguments(line, files)
        with replaced(*command.begins):
            end = run_main(command.main, args)
        return end, fault_of(end, plain=False), (args, [arg for arg in line if isinstance(arg, bytes)])

    explore(command_lines(command.options, command.sweep), examples, body)


@pytest.mark.parametrize("name", ["train", *(pytest.param(name, marks=LONG) for name in ("submit", "doctor"))])
def test_what_is_no_configuration_file(name: str, files: Files) -> None:
    command, faults = COMMANDS[name], Faults()
    with replaced(*command.begins):
        for place in files.places:
            for args in ([place], [place, "data.root=null"], *([f"{key}={place}", WITHOUT_TIMM] for key in PATHS)):
                faults.see(run_main(command.main, args), args)
        for content in ODD_FILES:
            path = files.write(content.encode("utf-8", "surrogatepass"))
            faults.see(run_main(command.main, [path, WITHOUT_TIMM]), content[:200])
    faults.refuse()


@pytest.mark.parametrize("examples", [2, pytest.param(300, marks=LONG)])
def test_a_process(examples: int, files: Files) -> None:
    """Command lines that are nearly always refused before torch is imported, as real processes."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def body(line: list[str | bytes]) -> tuple[End, str, object]:
        args = [*as_arguments(line, files), "model.nmae=resnet18"]
        command = [sys.executable, "-m", "distil_tl.cli", "train", *args]
        found = subprocess.run(
            [os.fsencode(arg) for arg in command],
            capture_output=True, env=environ, timeout=BOUND_S, check=False,
        )  # fmt: skip
        texts = [text.decode("utf-8", "backslashreplace") for text in (found.stdout, found.stderr)]
        end = End(found.returncode, texts[0], texts[1])
        fault = fault_of(end, plain=False)
        if not fault and "-h" not in args and "--help" not in args and end.status != 2:
            fault = f"status {end.status} for an unknown key"
        return end, fault, args

    explore(command_lines([]), examples, body)
