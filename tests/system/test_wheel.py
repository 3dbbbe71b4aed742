"""The wheel is complete: from an empty folder it finds its configurations, batch scripts and the package launch."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

TEMPLATES = {path.name for path in (ROOT / "slurm").glob("*.sbatch")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-m", "distil_tl", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_has_the_code_and_one_copy_of_each_other_file(installed: Path) -> None:
    code = {path.relative_to(ROOT) for name in ("distil_tl", "launch") for path in (ROOT / name).rglob("*.py")}
    assert code == {path.relative_to(installed) for path in installed.rglob("*.py")}
    shipped = installed / "distil_tl" / "shipped"
    for path in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "slurm").glob("*.sbatch")]:
        assert (shipped / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert {path.name for path in (shipped / "slurm").iterdir()} == TEMPLATES
    for path in [*(ROOT / "distil_tl" / "report").glob("*.[cj]s*"), *(ROOT / "launch").glob("*.sh")]:
        assert (installed / path.relative_to(ROOT)).is_file()


def test_names_and_commands_work_in_a_folder_with_a_launch_of_its_own(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("raise SystemExit('the wrong launch')")
    listed = run(installed, tmp_path, "init").stdout.splitlines()
    assert {line.split()[0] for line in listed if line.startswith("  ")} >= TEMPLATES | {"random"}
    assert "resnet50 names no images" in run(installed, tmp_path, "train", "resnet50").stderr
    assert (
        "data.root=nowhere is not a folder" in run(installed, tmp_path, "sweep", "random", "data.root=nowhere").stderr
    )
    status = run(installed, tmp_path, "status", "nowhere")
    assert (status.returncode, "nowhere" in status.stderr) == (2, True), status
