"""Run directories, told by their files: where a path is one and should be images, or should be one and is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distil_tl.utils.errors import UserError, listed
from distil_tl.utils.log import printable
from distil_tl.utils.paths import read_text

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"


def is_run_directory(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()


def runs_in(folder: Path) -> list[str]:
    """The sorted names of the run directories in a folder; empty if it can't be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if is_run_directory(path))
    except OSError:
        return []


def recorded_root(run_dir: Path) -> str | None:
    """`data.root` in the configuration of a run; None if there is none, or if it can't be read."""
    import yaml  # only for a message

    try:
        tree = yaml.safe_load(read_text(run_dir / CONFIG, "the configuration"))
    except (OSError, UserError, yaml.YAMLError):
        return None
    data = tree.get("data") if isinstance(tree, dict) else None
    root = data.get("root") if isinstance(data, dict) else None
    return root if isinstance(root, str) else None


def no_images(folder: Path) -> str:
    """Why a folder can't be given as images: it is a run directory; empty for any other folder."""
    if is_run_directory(folder):
        root = recorded_root(folder)
        of = f" (of images in {printable(root)})" if root else ""
        return f"{printable(folder)} is a run directory{of}; give the images' folder"
    return ""


def refuse_other_than_run(run_dir: Path, others: Sequence[Path] = ()) -> None:
    """Raise UserError, with a hint, if a path is not a run directory.

    Args:
        others: the other paths on the command line, among which the run directory or an exported model may be.
    """
    if (run_dir / CONFIG).is_file():
        return
    problem = f"{printable(run_dir)} is not a run directory"
    model = next(
        (path for path in others if is_run_directory(path) or (path.suffix == ".onnx" and path.is_file())), None
    )
    if model is not None:
        raise UserError(f"{problem}; give {printable(model)} first, and the images after it")
    for above in (run_dir.parent, run_dir.parent.parent):
        if is_run_directory(above) and run_dir.exists():
            chosen = f" --checkpoint {printable(run_dir.name)}" if run_dir.parent.name == CHECKPOINTS else ""
            raise UserError(f"{problem}, but in one: give {printable(above)}{chosen}")
    if runs := runs_in(run_dir):
        raise UserError(
            f"{problem}; it holds {listed([printable(run_dir / name) for name in runs], 5)}: give one of them"
        )
    raise UserError(f"{problem}: {CONFIG} is missing")
