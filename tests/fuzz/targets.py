"""Places to write to, of any kind, around things that must not be destroyed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tests.fuzz.trees import real_images


def build(root: Path) -> dict[str, Path]:
    """Folders `data` and `other` with files of the user, and the places to write to, by what they are."""
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
    (other / "text").write_text("of the user")
    (other / "photo.jpg").write_bytes(real_images()["jpg"][0])
    for name, target in {
        "link": "text", "link to photo": "photo.jpg", "link to folder": "folder", "dangling": "nowhere", "loop": "loop",
        "dangling deep": "nowhere/deep/file", "link to input": str(root / "data/train/cat/0.png"),
        "link to data": str(root / "data"), "link to null device": "/dev/null", "link to root": "/",
    }.items():  # fmt: skip
        (other / name).symlink_to(target)
    os.link(root / "data/train/cat/0.png", other / "hard link to input")
    os.mkfifo(other / "pipe")
    os.mknod(other / "socket", stat.S_IFSOCK | 0o600)
    if os.geteuid() == 0:
        os.mknod(other / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(other / "full", stat.S_IFCHR | 0o600, os.makedev(1, 7))
        os.mknod(other / "no device", stat.S_IFCHR | 0o600, os.makedev(240, 99))
        os.mknod(other / "no block device", stat.S_IFBLK | 0o600, os.makedev(240, 99))
    places = {path.name: path for path in other.iterdir()}
    inside = {
        "new": "new", "new folder": "newfolder/", "in a file": "text/x", "in a folder": "folder/x",
        "missing parent": "no/such/x", "in a pipe": "pipe/x",
        "in a loop": "loop/x", "in a dangling link": "dangling/x", "through a link": "link to folder/x",
        "long": "x" * 300, "longest": "x" * 255, "long path": "x/" * 3000 + "x", "slash": "text/",
        "folder slash": "folder/", "odd": "\udce9\n\x1b[31m", "cat.csv": "猫.csv", "an image's name": "new.JPG",
        "image folder's name": "a.png/", "option": "-rf", "percent": "%j", "dots": "folder/../new2", "tmp": ".tmp",
    }  # fmt: skip
    places |= {what: Path(f"{other}/{name}") for what, name in inside.items()}
    fixed = {
        "empty": "", "dot": ".", "dotdot": "..", "root": "/", "/dev/null": "/dev/null", "/dev/full": "/dev/full",
        "proc": "/proc/x", "/proc/self/fd": "/proc/self/fd/x", "sys": "/sys/x", "no fd": "/dev/fd/99",
        "tilde": "~nosuchuser/x", "/proc/version": "/proc/version", "stdin": "/dev/stdin", "/dev": "/dev",
    }  # fmt: skip
    places |= {what: Path(name) for what, name in fixed.items()}
    within = ("train", "train/cat", "train/cat/0.png", "train/new", "train/cat/new.csv", "new", "val/dog/0.png", "")
    places |= {f"data/{name}": root / "data" / name for name in within}
    return places
