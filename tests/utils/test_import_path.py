"""Files of the user in the current folder that have the names of libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distil_tl.utils.import_path import is_installed

ROOT = Path(__file__).parents[2]


def run(*args: str, cwd: Path, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    import os

    environ = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["distil_tl.train", "launch.submit"])
def test_files_of_the_user_are_not_imported(tmp_path: Path, module: str) -> None:
    for name in ("random.py", "omegaconf.py", "torch.py", "timm/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('imported')")
    done = run("-m", module, "seed=x", cwd=tmp_path)
    assert done.returncode == 2
    assert "`seed`: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["-m", "distil_tl.cli"], ["distil-tl"]])
@pytest.mark.parametrize(("file", "library"), [("omegaconf.py", "omegaconf"), ("random.py", "random")])
def test_a_file_that_is_looked_at_first_is_named(tmp_path: Path, command: list[str], file: str, library: str) -> None:
    (tmp_path / file).write_text("raise SystemExit('imported')")
    (tmp_path / "distil-tl").write_text("from distil_tl.cli.main import main; main()")
    done = run(*command, "train", "seed=x", cwd=tmp_path, path=f"{ROOT}:.")
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"distil_tl: {tmp_path / file} would be imported in place of the library {library}: rename it, or start"
    )


def test_a_folder_of_that_name_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm_of_mine" / "weights").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("timm_of_mine")
    assert is_installed("torch")
    assert not is_installed("there_is_none")
