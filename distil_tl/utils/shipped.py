"""Configurations, sweep files and batch scripts that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from distil_tl.utils.paths import path_problem

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has them in the package, see pyproject.toml; a checkout has them beside it.
_ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent


def shipped_files() -> dict[str, Path]:
    """All of them by name: `resnet50` for configs/resnet50.yaml, `train.sbatch` for slurm/train.sbatch."""
    configurations = [*_ROOT.glob("configs/*.yaml"), *_ROOT.glob("configs/*/*.yaml")]
    files = {path.stem: path for path in sorted(configurations)}
    return files | {path.name: path for path in sorted(_ROOT.glob("slurm/*.sbatch"))}


def find_configuration(path: Path, folder: Path | None = None) -> Path:
    """`path`, relative to `folder`, if it is a file; else the configuration that comes with the package under its name.

    Without either it is `path`, which does not exist.
    """
    own = path if folder is None else folder / path
    is_name = path.parent == Path() and not path.suffix and not path_problem(path)
    return own if not is_name or own.is_file() else shipped_files().get(path.name, own)


def name_of(path: Path) -> str:
    """How the file is named in the repository: `configs/resnet50.yaml`."""
    return path.relative_to(_ROOT).as_posix()
