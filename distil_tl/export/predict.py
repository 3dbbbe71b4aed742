#!/usr/bin/env python3
"""Predict the classes of images with the ONNX model beside this script: python predict.py PATH... [-o FILE.csv]

`distil-tl export` wrote both. The script needs onnxruntime, numpy and Pillow alone, and reads 8-bit RGB and grey JPEGs
and PNGs. It prepares them to the same bytes as evaluation in training did; any other image gets a row with an error. A
folder is searched at any depth. The CSV is that of `distil-tl predict MODEL.onnx PATH...`.
"""

# More than 300 lines, as it is one file that works alone.

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
SIDES = ("shorter_side", "both_sides", "longer_side")  # that is resized; the metadata has one of them
RUN = ("config.yaml", "checkpoints")  # of a folder that training wrote, whose images are samples
LEFTOVERS = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".thumbnails", ".AppleDouble", ".Trashes", "lost+found")


class RefusedError(Exception):
    """Why the content of a file, or an argument, can't be used."""


def read_image(path: Path, min_side: int) -> Any:
    """The pixels of an 8-bit RGB or grey JPEG or PNG, uint8 [H, W, 3], upright.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, down to a shorter side of `min_side` pixels.

    Raises:
        RefusedError: it is another image, or damaged.
        OSError: the file can't be read.
    """
    data = path.read_bytes()
    if not data:
        raise RefusedError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise RefusedError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed; make it smaller")
        _refuse_other_kinds(image, data)
        image.draft(None, (min_side, min_side))
        image.load()
        _refuse_other_kinds(image, data)  # transparency may be declared after the pixels
        return upright(np.asarray(image.convert("RGB")), image)
    except UnidentifiedImageError:
        raise RefusedError("not a JPEG or PNG, which are the formats that this script reads") from None
    except (RefusedError, MemoryError):
        raise
    except Exception as error:  # Pillow raises errors of any type for damaged files
        raise RefusedError(f"damaged image: {error or type(error).__name__}") from error


def _refuse_other_kinds(image: Image.Image, data: bytes) -> None:
    kind = "PNG" if image.format == "PNG" else "JPEG"
    if image.mode not in ("RGB", "L"):
        found = f"mode {image.mode}"
    elif kind == "PNG" and data[24] != 8:
        found = f"{data[24]} bits per channel"
    elif "transparency" in image.info:
        found = "transparency"
    else:
        return
    raise RefusedError(f"a {kind} with {found}: this script reads 8-bit RGB and grey without transparency")


def upright(pixels: Any, image: Image.Image) -> Any:
    """`pixels` [H, W, 3] rotated and mirrored according to the EXIF data of `image`."""
    try:
        orientation = int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata of an intact image
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def new_size(height: int, width: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width that an image is resized to."""
    if side := settings.get("both_sides"):
        return side, side
    if side := settings.get("longer_side"):
        scale = max(height, width) / side
        return max(1, round(height / scale)), max(1, round(width / scale))
    side = settings["shorter_side"]
    longer = int(side * max(height, width) / min(height, width))
    return (longer, side) if width <= height else (side, longer)


def resize_and_crop(pixels: Any, settings: dict[str, Any]) -> Any:
    """`pixels` [H, W, 3] as the model with these settings in its metadata expects them, [S, S, 3].

    The same bytes as torchvision's `Resize(..., antialias=True)` and `CenterCrop` of a uint8 tensor on the CPU.
    """
    size, old = settings["image_size"], pixels.shape[:2]
    new = new_size(old[0], old[1], settings)
    by_row, by_column = (filters(*lengths, settings["interpolation"]) for lengths in zip(old, new))  # noqa: B905
    starts = (max(0, round((length - size) / 2)) for length in new)
    rows, columns = (slice(start, start + min(size, length)) for start, length in zip(starts, new))  # noqa: B905
    needed = slice(by_row[0][rows.start], by_row[0][rows.stop - 1] + by_row[1].shape[1])
    pixels = weighted_sums(pixels[needed].transpose(1, 0, 2), by_column, columns, 0).transpose(1, 0, 2)
    pixels = weighted_sums(pixels, by_row, rows, needed.start)
    square = np.full((size, size, 3), settings.get("fill", 0), dtype=np.uint8)
    top, left = ((size - length) // 2 for length in pixels.shape[:2])
    square[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
    return square


@functools.lru_cache(maxsize=64)
def filters(length: int, new_length: int, interpolation: str) -> tuple[Any, Any, int]:
    """The weights of a resize from `length` to `new_length` pixels, as PyTorch computes them for uint8 images.

    Returns:
        For each new pixel the first pixel that it is computed from, int64 [new_length]; the weights of the pixels from
        there on, int32 [new_length, taps]; and by how many bits the weights are shifted: together they are 1 << bits.
    """
    if length == new_length or interpolation == "nearest":  # of one pixel each
        ratio = np.float32(length) / np.float32(new_length)
        first = np.floor(np.arange(new_length, dtype=np.float32) * ratio).astype(np.int64)
        return np.minimum(first, length - 1), np.full((new_length, 1), 2, dtype=np.int32), 1
    radius = 2 if interpolation == "bicubic" else 1
    scale = length / new_length
    support, inverse = radius * max(scale, 1.0), 1.0 / max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    centre = scale * (np.arange(new_length) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)  # towards zero
    count = np.clip(np.minimum((centre + support + 0.5).astype(np.int64), length) - first, 0, taps)
    distance = np.abs((np.arange(taps) + (first - centre)[:, None] + 0.5) * inverse)
    values = np.where(
        np.arange(taps) < count[:, None], cubic(distance) if radius == 2 else 1 - np.minimum(distance, 1), 0.0
    )
    total = np.zeros(new_length)
    for tap in range(taps):  # one after the other, for the same rounding
        total = total + values[:, tap]
    values = values / np.where(total == 0, 1.0, total)[:, None]
    bits = next((n for n in range(22) if int(0.5 + values.max() * (1 << (n + 1))) >= 1 << 15), 22)
    scaled = values * (1 << bits)
    return first, np.trunc(np.where(scaled < 0, scaled - 0.5, scaled + 0.5)).astype(np.int32), bits


def cubic(x: Any) -> Any:
    a = -0.5
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def weighted_sums(pixels: Any, weights: tuple[Any, Any, int], wanted: slice, offset: int) -> Any:
    """`pixels` uint8 [N, M, 3], from `offset` in the image, filtered along the first side at positions `wanted`."""
    first, table, bits = weights[0][wanted] - offset, weights[1][wanted], weights[2]
    total = np.full((len(first), *pixels.shape[1:]), 1 << (bits - 1), dtype=np.int32)
    for tap in range(table.shape[1]):
        positions = np.minimum(first + tap, len(pixels) - 1)  # beyond the end the weight is zero
        total += pixels[positions] * table[:, tap, None, None]
    return np.clip(total >> bits, 0, 255).astype(np.uint8)


def prepare(path: Path, settings: dict[str, Any]) -> Any:
    """An image as the model with these settings in its metadata expects it, uint8 [3, S, S]; raises as `read_image`."""
    side: int = next(settings[key] for key in SIDES if key in settings)
    return np.ascontiguousarray(resize_and_crop(read_image(path, 2 * side), settings).transpose(2, 0, 1))


def find_images(paths: Sequence[Path], extensions: tuple[str, ...]) -> list[Path]:
    """The files in `paths`, and those inside its folders with one of `extensions`, sorted by folder and name."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            if all((path / name).exists() for name in RUN):
                raise RefusedError(f"{path} is a run directory: give the images' folder")
            for folder, names in sorted(walk(str(path), extensions, ())):
                files += [Path(folder) / name for name in names]
        elif path.exists():
            files.append(path)
        else:
            raise RefusedError(f"there is no file or folder {path}")
    if not files:
        raise RefusedError(f"no image in {', '.join(map(str, paths))}")
    return files


def walk(folder: str, extensions: tuple[str, ...], parents: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each folder with the names of its images. What file managers and notebooks leave behind is left out."""
    real, names = os.path.realpath(folder), list[str]()
    if real in parents:
        raise RefusedError(f"{folder} contains itself: remove the symbolic link that forms this loop")
    if all(Path(folder, name).exists() for name in RUN):
        say(f"{folder} is a run directory, and is not searched")
        return
    for entry in os.scandir(folder):
        if entry.name in LEFTOVERS or entry.name.startswith("._"):
            continue
        path = Path(entry.path)
        if path.is_dir():
            yield from walk(entry.path, extensions, (*parents, real))
        elif entry.name.lower().endswith(extensions):
            if not path.is_file():  # a pipe or a device may never end
                raise RefusedError(f"{entry.path} is not a regular file, or a broken link: remove it")
            names.append(entry.name)
    yield folder, sorted(names)


def read_model(session: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings and classes in a model's metadata. It is tried once. Raises any Exception if it is another model."""
    metadata = session.get_modelmeta().custom_metadata_map
    settings, classes = (json.loads(metadata[f"distil_tl.{name}"]) for name in ("preprocess", "classes"))
    size, names = settings["image_size"], [*classes, *settings["extensions"]]
    sides = [settings[key] for key in SIDES if key in settings]
    known = settings["interpolation"] in ("bilinear", "bicubic", "nearest") and all(isinstance(n, str) for n in names)
    if not known or not all(1 <= size <= side <= 1 << 15 for side in sides):
        raise ValueError("its metadata is damaged")
    view = resize_and_crop(np.zeros((2, 3, 3), np.uint8), settings)
    answer = session.run(["probabilities"], {"images": view.transpose(2, 0, 1)[None]})[0]
    if answer.shape != (1, len(classes)) or not np.isfinite(answer).all():
        raise ValueError(f"it does not answer with probabilities of {len(classes)} classes")
    return settings, classes


def predictions(session: Any, files: list[Path], settings: dict[str, Any], batch_size: int) -> Iterator[Any]:
    """For each file the probabilities, float32 [C], or the reason why it can't be used."""
    for begin in range(0, len(files), batch_size):
        items: list[Any] = []
        for path in files[begin : begin + batch_size]:
            try:
                items.append(prepare(path, settings))
            except (RefusedError, OSError) as error:
                items.append(str(error))
        images = [item for item in items if not isinstance(item, str)]
        results = iter(session.run(None, {"images": np.stack(images)})[0] if images else ())
        yield from (item if isinstance(item, str) else next(results) for item in items)


def write_rows(
    file: IO[str], files: list[Path], results: Iterator[Any], classes: list[str], *, every: bool, excel: bool
) -> int:
    """Write the CSV; return how many files could not be used."""
    separator, point = ";," if excel else ",."
    columns = [f"p({name})" for name in classes] if every else []
    file.write("\ufeff" if excel else "")
    write_row(file, ["path", "prediction", "probability", *columns, "error"], separator)
    unusable = 0
    for name, result in zip(map(os.fsencode, files), results):  # noqa: B905  # Python 3.9
        path = name.decode("utf-8", "surrogateescape")  # in any locale
        if isinstance(result, str):
            unusable += 1
            write_row(file, [path, "", "", *("" for _ in columns), result], separator)
        else:
            best = int(result.argmax())
            numbers = [f"{p:.6f}".replace(".", point) for p in (result[best], *(result if every else ()))]
            write_row(file, [path, classes[best], *numbers, ""], separator)
    return unusable


def write_row(file: IO[str], row: Sequence[Any], separator: str) -> None:
    """Write a row of CSV. csv.writer alone leaves a carriage return unquoted, where readers end the row."""
    odd = any("\r" in str(cell) for cell in row)
    style: dict[str, Any] = {"delimiter": separator, "quoting": csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL}
    csv.writer(file, lineterminator="\n", **style).writerow(row)


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[IO[str]]:
    """The CSV to write, which replaces `path` when it is complete; None: standard output."""
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    if path is None:
        with open(sys.stdout.fileno(), "w", closefd=False, **text) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{os.getpid()}.tmp")
    try:
        with partial.open("x", **text) as file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def is_earlier_output(path: Path) -> bool:
    """Whether a file that exists begins like one that this script wrote, or is empty."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(100).decode("utf-8-sig", "replace")
    return not start or start.replace(";", ",").startswith("path,prediction,")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.py", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an image, or a folder to search")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--model", type=Path, metavar="FILE", help="default: the only .onnx file beside this script")
    parser.add_argument("--all", action="store_true", help="add a column with the probability of each class")
    parser.add_argument("--excel", action="store_true", help="for Excel with decimal commas: with semicolons and a BOM")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images (default: 32)")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """Predict; return the exit status. Raises RefusedError."""
    models = [options.model] if options.model else list(Path(__file__).parent.glob("*.onnx"))
    if len(models) != 1:
        raise RefusedError(f"{len(models)} .onnx files are beside this script: name one with --model")
    if options.batch_size < 1:
        raise RefusedError("--batch-size must be at least 1")
    exists = options.output is not None and os.path.lexists(options.output)
    if exists and not is_earlier_output(options.output):
        raise RefusedError(f"--output {options.output} exists, and is no earlier output: name another file")
    if not models[0].is_file():
        raise RefusedError(f"there is no file {models[0]}")
    import onnxruntime

    Image.MAX_IMAGE_PIXELS = None  # the limit is checked here
    setup = onnxruntime.SessionOptions()
    setup.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0  # else: all
    setup.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(models[0]), setup, providers=["CPUExecutionProvider"])
        settings, classes = read_model(session)
    except Exception as error:  # onnxruntime raises errors of many types
        reason = str(error).partition("\n")[0]
        raise RefusedError(f"{models[0]} was not written by `distil-tl export`, or is damaged ({reason})") from error
    files = find_images(options.paths, tuple(settings["extensions"]))
    results = predictions(session, files, settings, options.batch_size)
    with open_output(options.output) as file:
        unusable = write_rows(file, files, results, classes, every=options.all, excel=options.excel)
    if options.output is not None:
        say(f"{len(files):,} rows in {options.output}")
    if unusable:
        say(f"{unusable} of {len(files)} files can't be used; see column error")
    return 2 if unusable == len(files) else 0


def say(message: str) -> None:
    """Write a line to standard error, without control characters that may be in names of files."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    sys.stderr.write(f"predict.py: {shown}\n")


def main() -> int:
    try:
        return run(parse_arguments())
    except BrokenPipeError:  # the reader of standard output, such as `head`, has exited
        return 0
    except (RefusedError, OSError, ImportError, MemoryError) as error:
        say(str(error) or type(error).__name__)
        return 1 if isinstance(error, MemoryError) else 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what is not complete is removed
    sys.exit(main())
