"""Any options of the commands that take a run directory or images: refused in a sentence, or accepted."""

from __future__ import annotations

import importlib
import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.options import odd_places, option_lines
from tests.fuzz.running import End, explore, fault_of, replaced, run_main, snapshot
from tests.helpers.arguments import SMALLEST
from tests.helpers.fake_slurm import instead_of_slurm
from tests.helpers.trained import make_run

LONG = pytest.mark.fuzz
# Where the work of a command begins; the others do it, as it takes milliseconds.
BEGINS = {
    "evaluate": "distil_tl.evaluate.open_split",
    "predict": "distil_tl.cli.predictions.file_loader",
    "prepare": "distil_tl.cli.preparing.copy_resized",
    "compare": "distil_tl.cli.comparison.images_of",
    "export": "distil_tl.cli.exports.to_onnx",
    "extend": "distil_tl.train.open_splits",
}
MODULES = {
    "evaluate": "distil_tl.evaluate", "status": "launch.status", "logs": "launch.logs",
    **{name: f"distil_tl.cli.{name}" for name in ("predict", "prepare", "compare", "export", "extend")},
}  # fmt: skip
LENGTHS = {"evaluate": 2000, "predict": 3000, "prepare": 2000, "status": 300, "logs": 300}
CASES = [
    pytest.param(name, examples, marks=marks)
    for name in MODULES
    for examples, marks in ((6, ()), (LENGTHS.get(name, 1000), LONG))
]


class Place:
    """A folder with images, files of the user and a run directory; the run and each change are checked.

    Attributes:
        given: the usual arguments of each command.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.build()

    def build(self) -> None:
        """Make everything, from the beginning."""
        root = self.root
        shutil.rmtree(root, ignore_errors=True)
        targets.build(root)
        self.run = make_run(root / "run", root / "data", 1, ["cat", "dog"], SMALLEST)
        run, data = str(self.run), str(root / "data")
        new = str(root / "other" / "new")
        self.given = {
            "evaluate": [run], "predict": [run, f"{data}/val"], "prepare": [data, f"--out={new}"],
            "compare": [run, run], "export": [run, f"--output={new}.onnx"],
            "extend": [run, "stages.head.epochs=+1"], "status": [run], "logs": [run],
        }  # fmt: skip
        self.before = snapshot(root)

    def lost(self) -> str:
        """What was changed of the user's files; what is new is removed. An output may replace a text."""
        now = snapshot(self.root)
        texts = {os.fsencode(os.path.realpath(self.root / "other" / "text"))}
        changed = [
            path
            for path, old in self.before.items()
            if now.get(path) != old
            and path not in texts
            and not (old[0] >> 12 == 0o4 and path in now and set(old[2]) <= set(now[path][2]))
        ]
        for path in sorted(now.keys() - self.before.keys(), reverse=True):
            with suppress(OSError):
                os.remove(path) if stat.S_IFMT(os.lstat(path).st_mode) != stat.S_IFDIR else os.rmdir(path)  # noqa: PTH107, PTH106
        self.before = snapshot(self.root)
        return f"changed: {changed}" if changed else ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    instead_of_slurm(tmp_path, monkeypatch)
    monkeypatch.setattr(os, "sync", lambda: None)
    return Place(tmp_path / "x")


def feed(pipe: Path) -> None:
    """Let a command that opens the pipe for reading, or for writing, go on."""
    with suppress(OSError):
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize(("name", "examples"), CASES)
def test_options(name: str, examples: int, place: Place) -> None:
    main: Callable[[list[str]], int] = importlib.import_module(MODULES[name]).main
    pipe = place.root / "other" / "pipe"
    places = odd_places(place.root)
    further = places if name == "predict" else [] if name in ("prepare", "compare", "status", "logs") else ["seed=1"]

    def body(line: list[str]) -> tuple[End, str, object]:
        reader = threading.Thread(target=targets.read_pipe, args=(pipe,), daemon=True)
        if any("pipe" in arg for arg in line):
            reader.start()
        with ExitStack() as stack:
            if name in BEGINS:
                stack.enter_context(replaced(BEGINS[name]))
            stack.enter_context(mock.patch("distil_tl.utils.home.provide_home"))
            end = run_main(main, line)
        feed(pipe)
        fault = fault_of(end, plain=False) or place.lost()
        if fault:  # for the next example
            place.build()
        return end, fault, line

    strategy: st.SearchStrategy[list[str]] = option_lines(name, [*places, str(place.run)], place.given[name], further)
    explore(strategy, examples, body)
