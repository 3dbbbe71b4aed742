"""Any place to write to: nothing of the user is destroyed, and a place that can't be written to is refused at once."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from distil_tl import train
from distil_tl.cli import predict, prepare
from distil_tl.inference import RestoredModel
from tests.fuzz import targets
from tests.fuzz.running import End, Faults, fault_of, replaced, run_main, snapshot
from tests.fuzz.test_trees import restored  # noqa: F401 - a fixture
from tests.helpers.arguments import small_args

DEVICES = ("/dev/null", "/dev/full", "/dev/stdin")


def kinds() -> list[int]:
    return [os.lstat(name).st_mode for name in DEVICES]


def each_place(tmp_path: Path, run: Callable[[Path, Path], End], *, folder: bool = False, ending: str = "") -> None:
    """Run a command with every place; report all faults.

    A refused place leaves everything as it was. An accepted one changes only what it names, which was a file of the
    user only if that could be meant: a text to be replaced.

    Args:
        run: from the root and the place.
        folder: the command writes a folder, or replaces only what it wrote, so that no file there may change.
        ending: of the names of all places.
    """
    faults, devices = Faults(), kinds()
    (tmp_path / "names").mkdir()
    for what in targets.build(tmp_path / "names", ending):
        root = tmp_path / "x"
        place = targets.build(root, ending)[what]
        with suppress(OSError):
            if stat.S_ISFIFO(os.stat(place).st_mode):  # noqa: PTH116 - someone reads it
                threading.Thread(target=targets.read_pipe, args=(place,), daemon=True).start()
        before = snapshot(root)
        with mock.patch.object(os, "fsync"):  # which takes long on a busy disk
            end = run(root, place)
        real = os.fsencode(os.path.realpath(place))
        now = snapshot(root)
        lost = []
        for path, old in before.items():
            new = now.get(path)
            same = old == new or (old[0] >> 12 == 0o4 and new is not None and set(old[2]) <= set(new[2]))
            replaced_text = not folder and path == real and old[0] >> 12 == 0o10 and b"of the user" in old[2][1]
            if not same and not (replaced_text and end.status != 2):
                lost.append(f"{os.fsdecode(path)!r}: {str(old)[:90]} -> {str(new)[:90]}")
        new = sorted(os.fsdecode(path) for path in now.keys() - before.keys())
        fault = fault_of(end) or (f"lost: {lost}" if lost else "")
        fault = fault or (f"refused, but new: {new}" if end.status == 2 and new else "")
        fault = fault or ("a device was replaced" if kinds() != devices else "")
        faults.see(end, (what, end.err[-200:]), fault)
        with suppress(OSError):  # the reader of a pipe that was refused ends
            os.close(os.open(place, os.O_WRONLY | os.O_NONBLOCK))
        shutil.rmtree(os.fsencode(root))
    faults.refuse()


def test_the_output_of_predict(tmp_path: Path, restored: RestoredModel) -> None:  # noqa: F811 - the fixture
    def run(root: Path, place: Path) -> End:
        with mock.patch("distil_tl.cli.predictions.restore_model", return_value=restored):
            return run_main(predict.main, ["run", str(root / "data/train"), f"--output={place}", "--workers=0"])

    each_place(tmp_path, run)


def test_the_copy_of_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)

    def run(root: Path, place: Path) -> End:
        with mock.patch.object(os, "sync"):
            return run_main(prepare.main, [str(root / "data"), f"--out={place}", "--resize=8", "--workers=0"])

    each_place(tmp_path, run, folder=True)


def test_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(root: Path, place: Path) -> End:
        with replaced("distil_tl.train.run_stage"):  # the run directory is open then
            return run_main(train.main, [*small_args(root / "data"), f"run_dir={place}"])

    each_place(tmp_path, run, folder=True)
