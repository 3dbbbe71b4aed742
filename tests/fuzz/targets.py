"""Places to write to, of any kind, around things that must not be destroyed."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from tests.fuzz.trees import real_images


def build(root: Path, ending: str = "") -> dict[str, Path]:
    """Folders `data` and `other` with files of the user, and the places to write to, by what they are.

    Args:
        ending: of the names of all places, for a command that demands one.
    """
    picture = real_images()["png"][0]
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(6):
                (folder / f"{number}.png").write_bytes(picture)
    other = root / "other"
    (other / "folder").mkdir(parents=True)
    (other / "folder" / "file").write_text("of the user")
    for name in {"text", f"text{ending}"}:
        (other / name).write_text("of the user")
    if ending:
        (other / f"folder{ending}").mkdir()
    (other / "photo.jpg").write_bytes(real_images()["jpg"][0])
    for name, target in {
        "link": "text", "link to photo": "photo.jpg", "link to folder": "folder", "dangling": "nowhere", "loop": "loop",
        "dangling deep": "nowhere/deep/file", "link to input": str(root / "data/train/cat/0.png"),
        "link to data": str(root / "data"), "link to null device": "/dev/null", "link to root": "/",
    }.items():  # fmt: skip
        (other / f"{name}{ending}").symlink_to(f"{target}{ending}" if target == name else target)
    os.link(root / "data/train/cat/0.png", other / f"hard link to input{ending}")
    os.mkfifo(other / f"pipe{ending}")
    os.mknod(other / f"socket{ending}", stat.S_IFSOCK | 0o600)
    if os.geteuid() == 0:
        os.mknod(other / f"null{ending}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(other / f"full{ending}", stat.S_IFCHR | 0o600, os.makedev(1, 7))
        os.mknod(other / f"no device{ending}", stat.S_IFCHR | 0o600, os.makedev(240, 99))
        os.mknod(other / f"no block device{ending}", stat.S_IFBLK | 0o600, os.makedev(240, 99))
    places = {path.name: path for path in other.iterdir()}
    inside = {
        "new": "new", "new folder": "newfolder/", "in a file": "text/x", "in a folder": "folder/x",
        "missing parent": "no/such/x", "in a pipe": "pipe/x",
        "in a loop": "loop/x", "in a dangling link": "dangling/x", "through a link": "link to folder/x",
        "long": "x" * 300, "longest": "x" * 255, "long path": "x/" * 3000 + "x", "slash": "text/",
        "folder slash": "folder/", "odd": "\udce9\n\x1b[31m", "cat.csv": "猫.csv", "an image's name": "new.JPG",
        "image folder's name": "a.png/", "option": "-rf", "percent": "%j", "dots": "folder/../new2", "tmp": ".tmp",
    }  # fmt: skip
    places |= {what: Path(f"{other}/{name}{ending}") for what, name in inside.items()}
    fixed = {
        "empty": "", "dot": ".", "dotdot": "..", "root": "/", "/dev/null": "/dev/null", "/dev/full": "/dev/full",
        "proc": "/proc/x", "/proc/self/fd": "/proc/self/fd/x", "sys": "/sys/x", "no fd": "/dev/fd/99",
        "tilde": "~nosuchuser/x", "/proc/version": "/proc/version", "stdin": "/dev/stdin", "/dev": "/dev",
    }  # fmt: skip
    if not ending:  # such a name would be new, and outside this folder
        places |= {what: Path(name) for what, name in fixed.items()}
    within = ("train", "train/cat", "train/cat/0.png", "train/new", "train/cat/new.csv", "new", "val/dog/0.png", "")
    places |= {f"data/{name}": root / "data" / f"{name}{ending}" for name in within}
    return places


def read_pipe(pipe: Path) -> None:
    """Read a pipe, in a thread; it may be gone before this begins."""
    with suppress(OSError):
        pipe.read_bytes()
