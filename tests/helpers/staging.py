"""Copies of images on a node's own disk, made and interrupted by tests."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distil_tl.data.index import Index
from distil_tl.data.local_copy import stage_folder
from distil_tl.data.scan import scan
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from tests.helpers.ranks import rank, train

ALONE = DistInfo(Launch(), torch.device("cpu"), 60.0)
SHORT = ["stages.full.epochs=0", "stages.head.features=off"]  # a run of one short stage that reads images


def indexes(root: Path) -> dict[str, Index]:
    train = scan(root / "train")
    return {"train": train, "val": scan(root / "val", classes=train.classes)}


def copied(root: Path, near: Path) -> Path:
    """The copy of `root` below `near`, which must be possible."""
    copy = stage_folder(ALONE, str(near), indexes(root))
    assert copy is not None
    return copy


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def folders_of(near: Path) -> list[Path]:
    return sorted(near.iterdir())


def fingerprints(run_dir: Path) -> Any:
    return json.loads((run_dir / "checkpoints" / "last" / "state.json").read_text())["data"]


# In the ranks.


def interrupted(body: Callable[..., Any], args: Any, number: int, at: int) -> tuple[Any, str]:
    """`body(args)`, which copies images, with signal `number` in the middle of file `at`; its result and stderr."""
    module: Any = importlib.import_module("distil_tl.data.local_folder")
    copying: Any = importlib.import_module("distil_tl.data.local_copy")
    original, count = module.FolderWriter.write, iter(range(1000))

    def write(writer: Any, reader: Any, name: str, size: int) -> None:
        if next(count) < at:
            original(writer, reader, name, size)
            return
        (writer.images / name).write_bytes(reader.read(size // 2))
        os.kill(os.getpid(), number)
        while not writer.stopped.is_set():
            time.sleep(0.01)

    module.FolderWriter.write, copying.THREADS = write, 2
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        result = body(args)
    return result, stderr.getvalue()


def copy_alone(args: tuple[str, str]) -> None:
    copied(Path(args[0]), Path(args[1]))


def counted_copy(root: str, near: str, log: str) -> str:
    """A copy made alone, as one job of several on a node; a byte is appended to the log for each file."""
    module: Any = importlib.import_module("distil_tl.data.local_folder")
    original = module.FolderWriter.write

    def write(*args: Any) -> None:
        original(*args)
        time.sleep(0.002)
        with Path(log).open("ab") as file:
            file.write(b".")

    module.FolderWriter.write = write
    return str(copied(Path(root), Path(near)))


def as_node_of_its_own() -> None:
    """Let this rank be the only one of its node."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank())}


def watched_train(args: list[str], disks: list[str | None]) -> tuple[int, list[str], str]:
    """`reading_train` with each rank on its own node, whose disk is `$DISK`."""
    as_node_of_its_own()
    disk = disks[rank()]
    if disk is not None:
        os.environ["DISK"] = disk
    return reading_train(args)


def reading_train(args: list[str]) -> tuple[int, list[str], str]:
    """Train; the exit status, the folders that images were read from, and the output."""
    loader: Any = importlib.import_module("distil_tl.data.loader")
    decode, roots = loader.decode, set()

    def noted(path: Path, *args: Any, **kwargs: Any) -> Any:
        roots.add(str(path.parents[2]))
        return decode(path, *args, **kwargs)

    loader.decode = noted
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        status = train(args)
    return status, sorted(roots), output.getvalue()
