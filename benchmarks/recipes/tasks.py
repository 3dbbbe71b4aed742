"""The images that recipes are compared on: folders with train, val and test, and smaller forms of them."""

from __future__ import annotations

import random
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.imbalance import link_long_tail
from distil_tl.data.digits import digits_folder
from distil_tl.utils.errors import UserError

FORMS = ("full", "small", "long")
SMALL, RATIO = 10, 20  # images of a class; largest to smallest class of a long tail


@dataclass(frozen=True)
class Task:
    """A folder with train/ and val/, and the arguments that belong to it."""

    name: str
    root: Path
    arguments: tuple[str, ...]


def named(text: str, option: str) -> tuple[str, list[str]]:
    """'NAME=word word' as the name and the words.

    Raises:
        UserError: there is no name.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name or "/" in name or " " in name:
        raise UserError(f"{option} {text!r}: give 'NAME=...', with a name that can be a folder")
    return name, shlex.split(rest)


def read_task(text: str) -> Task:
    """The task of an option --task. Raises UserError."""
    if text == "digits":
        return Task("digits", digits_folder(), ("data.hflip=false",))
    name, words = named(text, "--task")
    if not words or not all((Path(words[0]) / split).is_dir() for split in ("train", "val")):
        raise UserError(f"--task {text!r}: give 'NAME=FOLDER', a folder with train/ and val/")
    return Task(name, Path(words[0]).absolute(), tuple(words[1:]))


def prepare(task: Task, form: str, seed: int, work: Path) -> Path:
    """A folder of links to the images of a form of a task, with train, val and test; made once."""
    if form == "full" and (task.root / "test").is_dir():
        return task.root
    target = work / (f"{task.name}-{form}" if form == "full" else f"{task.name}-{form}-{seed}")
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if form == "long":
        link_long_tail(task.root, partial, RATIO, seed)
        (partial / "val").unlink()
    else:
        rng, count = random.Random(seed), SMALL if form == "small" else None
        for folder in sorted(path for path in (task.root / "train").iterdir() if path.is_dir()):
            images = sorted(path for path in folder.iterdir() if path.is_file())
            link(images if count is None else rng.sample(images, min(count, len(images))), partial / "train")
    if (task.root / "test").is_dir():
        for split in ("val", "test"):
            (partial / split).symlink_to((task.root / split).resolve())
    else:
        divide(task.root / "val", partial)
    partial.rename(target)
    return target


def link(images: Iterable[Path], split: Path) -> None:
    """Link images into folders of their classes."""
    for image in images:
        (split / image.parent.name).mkdir(parents=True, exist_ok=True)
        (split / image.parent.name / image.name).symlink_to(image.resolve())


def divide(val: Path, target: Path) -> None:
    """Link one half of each class of `val` into target/val, the other into target/test; the same halves each time."""
    rng, longer = random.Random(0), 0
    for folder in sorted(path for path in val.iterdir() if path.is_dir()):
        images = sorted(path for path in folder.iterdir() if path.is_file())
        rng.shuffle(images)
        halves = images[::2], images[1::2]
        link(halves[longer], target / "val")
        link(halves[1 - longer], target / "test")
        longer ^= len(images) % 2  # classes of odd size: the longer half in turns
