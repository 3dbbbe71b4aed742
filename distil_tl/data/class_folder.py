"""A folder of images without folders of classes, given as data.root: it may be that of one class."""

from __future__ import annotations

from itertools import islice
from pathlib import Path


def no_class_folders(root: Path, extensions: tuple[str, ...]) -> str:
    """What is said of a folder without folders: another one if it has images, beside other folders with images."""
    images, above = _images_in(root, extensions), root.parent if root.name not in ("", "..") else root / ".."
    try:
        beside = list(islice((path for path in above.iterdir() if path.is_dir() and not path.samefile(root)), 20))
    except OSError:
        beside = []
    if images and any(_images_in(path, extensions) for path in beside):
        return f"data.root={root} has no class folders, only images ({images:,}); did you mean data.root={above}?"
    return f"data.root={root} has no folder; it must hold CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg"


def _images_in(folder: Path, extensions: tuple[str, ...]) -> int:
    try:
        return sum(path.name.lower().endswith(extensions) for path in folder.iterdir())
    except OSError:
        return 0
