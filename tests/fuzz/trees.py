"""Folders of images as they are found on disks: odd names, links, pipes, leftovers, and damaged images."""

from __future__ import annotations

import functools
import io
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from distil_tl.data.walk import LEFTOVER_FOLDERS
from tests.helpers.image_bytes import chunk, png
from tests.helpers.images import draw as draw_picture

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF data: orientation 6
FORMATS = {
    "jpg": ("JPEG", ["RGB", "L", "CMYK"]), "png": ("PNG", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"]),
    "gif": ("GIF", ["P", "L"]), "webp": ("WEBP", ["RGB", "RGBA"]), "bmp": ("BMP", ["RGB", "L", "1"]),
    "tif": ("TIFF", ["RGB", "L", "F", "I;16", "CMYK", "1"]), "ppm": ("PPM", ["RGB"]), "pgm": ("PPM", ["L"]),
    "avif": ("AVIF", ["RGB"]), "jp2": ("JPEG2000", ["RGB", "L"]),
}  # fmt: skip
ODD_NAMES = [
    b"a", b"-rf", b"--help", b"-", b" ", b"  a.jpg ", b"a b.jpg", b"a\nb.jpg", b"\n.png", b"\x1b[31m.jpg", b"\r.jpg",
    b"caf\xe9.jpg", b"\xff\xfe.png", "猫.jpg".encode(), "💩.png".encode(), "e\u0301.jpg".encode(),
    "\u202egpj.png".encode(), b"A.JPG", b"a.JpEg", b"a.jpg.txt", b"a.jpg.", b".jpg", b"..jpg", b"...", b".hidden.jpg",
    b"jpg", b"a.tar.gz", b"a=b.jpg", b"$HOME.jpg", b"`ls`.jpg", b"*.jpg", b"?.png", b"[a].jpg", b"'.jpg", b'".jpg',
    b"a,b.jpg", b"a;b.jpg", b"%s.jpg", b"\\.jpg", b"x" * 251 + b".jpg", b"x" * 255, "猫".encode() * 83 + b".jpg",
    b"a.heic", b"a.gif", b"a.avif", b"a.jfif", b"a.svg", b"a.mp4", b"Thumbs.db", b"desktop.ini", b".DS_Store",
    b"._a.jpg", b"._", b".#a.jpg", b"a.jpg~", b"#a.jpg#", b"a.jpg.part", b"a.crdownload", b".ipynb_checkpoints",
    b"__MACOSX", b"@eaDir", b".thumbnails", b".Trashes", b"lost+found", b".git", b"__pycache__", b"train", b"val",
    b"test", b"prepared.json", b".shrink-0123456789abcdef.tmp", b"1.jpg", b"0.PNG", b"nul", b"con.jpg", b"a.jpg\t",
    b"\x01.jpg", b"\x7f.png", "\u2028.jpg".encode(), b"a.png.jpg", b"a.bmp.png", b"a.bmp", b"a.bmp.png_.png",
]  # fmt: skip
HARMLESS = [
    "image", "image", "image", "image", "image", "image", "text", "empty", "folder with image", "link to image",
    "link to folder", "hard link", "folder of folders",
]  # fmt: skip
KINDS = [
    *HARMLESS, "folder", "link to itself", "link to parent", "dangling link", "link to text", "pipe", "socket",
    "null device", "zero device", "closed file", "closed folder", "link to /dev/zero",
    "link to nowhere in a closed folder",
]  # fmt: skip


SIZES = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]
BEGINNINGS = [b"", b"\0", b"GIF89a", b"\xff\xd8\xff\xd9", b"RIFF\0\0\0\0WEBP", b"BM", b"<svg/>", b"<html>"]


@functools.cache
def real_images() -> dict[str, list[bytes]]:
    """Small images of each format that Pillow can write, by extension."""
    import numpy as np

    found: dict[str, list[bytes]] = {}
    rng = np.random.default_rng(0)
    for extension, (kind, modes) in FORMATS.items():
        for mode in modes:
            image = draw_picture("stripes", rng).resize((20, 17))
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
            else:
                image = image.convert(mode)
            file = io.BytesIO()
            with suppress(OSError, KeyError, ValueError):
                image.save(file, kind, **({"exif": TURNED} if (kind, mode) == ("JPEG", "RGB") else {}))
                found.setdefault(extension, []).append(file.getvalue())
    return found


@st.composite
def images(draw: st.DrawFn) -> tuple[str, bytes]:
    """An extension, and the content of an image file: intact, or changed in one of many ways."""
    extension = draw(st.sampled_from([*real_images(), "jpg", "jpg", "png", "png"]))
    content = draw(st.sampled_from(real_images()[extension]))
    how = draw(st.integers(0, 14))
    if how == 0:
        content = content[: draw(st.integers(0, len(content)))]
    elif how in (1, 2):
        changed = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
        content = bytes(changed)
    elif how == 3:  # near the beginning are the sizes
        changed = bytearray(content)
        at = draw(st.integers(0, min(60, len(changed) - 4)))
        changed[at : at + 4] = draw(st.sampled_from(SIZES))
        content = bytes(changed)
    elif how == 4:
        other = draw(st.sampled_from(real_images()[draw(st.sampled_from([*real_images()]))]))
        at = draw(st.integers(0, 40))
        content = other[:at] + content[at:]
    elif how == 5:
        content = draw(st.sampled_from(BEGINNINGS))
    elif how == 6:
        sides = [(0, 0), (1, 1), (2**31 - 1, 2**31 - 1), (30000, 30000), (1, 60000), (60000, 1), (20, 0)]
        width, height = draw(st.sampled_from(sides))
        content = png(width, height, 8, 2, bytes(100))
    elif how == 7:
        content += draw(st.binary(max_size=30))
    elif how == 8:
        extension = draw(st.sampled_from([*FORMATS, "jpeg", "heic", "jfif", "tiff", "JPG"]))
    elif how == 9:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + content[draw(st.integers(at, len(content))) :]
    elif how == 10:
        text = chunk(b"iTXt", b"a\0\1\0\0\0" + b"x" * 20) + chunk(b"iCCP", b"a\0\0xx") + chunk(b"eXIf", b"MM\0*")
        content = png(20, 17, 8, 2, bytes(61 * 17), text)
    return extension, content


names = st.one_of(
    st.sampled_from(ODD_NAMES),
    st.sampled_from(ODD_NAMES),
    st.binary(min_size=1, max_size=6).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_") + b".png"),
    st.builds(lambda number, end: f"{number}.{end}".encode(), st.integers(0, 9), st.sampled_from([*FORMATS, "heic"])),
).filter(lambda name: name not in (b".", b"..") and len(name) <= 255)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """Something in a folder. `place` numbers the folder, `content` is that of an image."""

    place: int
    name: bytes
    kind: str
    content: bytes


@st.composite
def nodes(draw: st.DrawFn, kinds: list[str]) -> Node:
    extension, content = draw(images())
    kind, name = draw(st.sampled_from(kinds)), draw(names)
    if kind == "image" and draw(st.booleans()):
        name = f"{draw(st.integers(0, 99))}.{extension}".encode()
    return Node(draw(st.integers(0, 30)), name, kind, content)


def trees(most: int = 8) -> st.SearchStrategy[list[Node]]:
    """What is beside healthy images. Half of the trees have nothing that must be refused."""
    return st.lists(nodes(HARMLESS), max_size=most) | st.lists(nodes(KINDS), max_size=most)


def build(root: Path, tree: list[Node], splits: tuple[str, ...] = ("train", "val")) -> None:
    """Make the folder: two images of two classes in each split, and the nodes of the tree; `outside` is beside it."""
    outside = root.with_name("outside")
    outside.mkdir(parents=True)
    good = real_images()["png"][0]
    (outside / "photo.png").write_bytes(good)
    folders = []
    for split in splits:
        for name in ("cat", "dog"):
            folder = root / split / name if split else root / name
            folder.mkdir(parents=True)
            (folder / "good1.png").write_bytes(good)
            (folder / "good2.jpg").write_bytes(real_images()["jpg"][0])
            folders.append(os.fsencode(folder))
    folders += folders * 2 + [os.fsencode(root), *(os.fsencode(root / split) for split in splits)]
    for node in tree:
        with suppress(FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
            _add(folders, node, os.fsencode(outside), good)


def _add(folders: list[bytes], node: Node, outside: bytes, good: bytes) -> None:
    parent = folders[node.place % len(folders)]
    path = os.path.join(parent, node.name)  # noqa: PTH118 - bytes
    if os.path.lexists(path):
        return

    def write(where: bytes, content: bytes) -> None:
        with open(where, "xb") as file:  # noqa: PTH123 - bytes
            file.write(content)

    links = {
        "link to image": os.path.join(outside, b"photo.png"), "link to folder": outside, "link to itself": node.name,  # noqa: PTH118
        "link to parent": b"..", "dangling link": b"nowhere", "link to /dev/zero": b"/dev/zero",
        "link to nowhere in a closed folder": b"/root/nowhere/x",
    }  # fmt: skip
    if node.kind in links:
        os.symlink(links[node.kind], path)  # noqa: PTH211 - bytes
    elif node.kind in ("image", "closed file"):
        write(path, node.content)
    elif node.kind == "text":
        write(path, b"text\n")
    elif node.kind == "empty":
        write(path, b"")
    elif node.kind == "hard link":
        os.link(os.path.join(outside, b"photo.png"), path)  # noqa: PTH118 - bytes
    elif node.kind == "link to text":
        write(os.path.join(outside, b"text"), b"text")  # noqa: PTH118
        os.symlink(os.path.join(outside, b"text"), path)  # noqa: PTH118, PTH211
    elif node.kind == "pipe":
        os.mkfifo(path)
    elif node.kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif node.kind.endswith("device"):
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3 if "null" in node.kind else 5))
    elif "folder" in node.kind:
        os.mkdir(path)  # noqa: PTH102 - bytes
        folders.append(path)
        if node.kind == "folder with image":
            write(os.path.join(path, b"1.png"), good)  # noqa: PTH118
        elif node.kind == "folder of folders":
            for _ in range(12):
                path = os.path.join(path, b"d")  # noqa: PTH118
                os.mkdir(path)  # noqa: PTH102
            write(os.path.join(path, b"1.png"), node.content)  # noqa: PTH118
    if node.kind.startswith("closed"):
        os.chmod(path, 0)  # noqa: PTH101


def count_files(folder: Path) -> int:
    """All that is in a folder but folders, links followed; what another program left behind is one, with all in it."""
    count, pending = 0, [os.fsencode(folder)]
    while pending:
        for entry in os.scandir(pending.pop()):
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False
            leftover = entry.name.startswith(b"._") or os.fsdecode(entry.name) in LEFTOVER_FOLDERS
            if is_folder and not leftover:
                pending.append(entry.path)
            else:
                count += 1
    return count
