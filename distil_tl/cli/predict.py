"""`distil-tl predict RUN_DIR PATHS...`: classes of images, files or whole folders, as CSV."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distil_tl.data.config import IMG_EXTENSIONS, default_workers
from distil_tl.data.decode import ImageError
from distil_tl.distributed.process_group import available_cpus
from distil_tl.inference import Transform, restore
from distil_tl.training.network import ImageNetwork
from distil_tl.training.precision import usual_way
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import Progress


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl predict",
        description="Write path, prediction, probability (and error, where a file can't be used) for each image.",
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an image, or a folder to search")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--checkpoint", default="best", help="best, last, or a folder in RUN_DIR/checkpoints")
    parser.add_argument("--all", action="store_true", help="also a column with the probability of each class")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=default_workers(available_cpus()))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return run_command("distil-tl predict", lambda: run(parser.parse_args(args)))


def run(options: argparse.Namespace) -> None:
    """Predict as `options` (see `main`) say.

    Raises:
        UserError: no such run or path, no image among the paths, or none that can be read.
    """
    if options.batch_size < 1 or options.workers < 0:
        raise UserError("--batch-size must be at least 1, and --workers 0 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device")
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")
    paths = find_images(options.paths)
    restored = restore(options.run_dir, options.checkpoint)
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    network = ImageNetwork(restored.model, usual_way(restored.precision, restored.model.module, device), device)
    network.fold(restored.image_size).eval()
    dataset = _Images(paths, Transform(restored.model.preprocess, restored.image_size))
    loader = DataLoader(
        dataset, batch_size=options.batch_size, num_workers=options.workers, collate_fn=list, pin_memory=False
    )
    bar = Progress("predict", len(paths), show=options.output is not None)
    failed = 0
    with _open(options.output) as file:
        writer = csv.writer(file, lineterminator="\n")
        per_class = [f"p({name})" for name in restored.classes] if options.all else []
        writer.writerow(["path", "prediction", "probability", *per_class, "error"])
        done = 0
        for views in loader:
            for row, view in zip(_probabilities(network, views, device), views, strict=True):
                path = paths[done]
                done += 1
                if isinstance(view, str):
                    failed += 1
                    writer.writerow([path, "", "", *("" for _ in per_class), view])
                    continue
                best = int(row.argmax())
                columns = [f"{p:.6f}" for p in row.tolist()] if options.all else []
                writer.writerow([path, restored.classes[best], f"{row[best]:.6f}", *columns, ""])
            bar.advance(len(views))
    bar.close()
    if failed:
        sys.stderr.write(f"distil-tl predict: {failed} of {len(paths)} files can't be used; see the error column\n")
    if failed == len(paths):
        raise UserError("not one of the files is a usable image")


@torch.inference_mode()
def _probabilities(network: ImageNetwork, views: list[Tensor | str], device: torch.device) -> Tensor:
    """Probabilities float32 [N, C]; rows of files that can't be used are zero."""
    good = [i for i, view in enumerate(views) if isinstance(view, Tensor)]
    if not good:
        return torch.zeros(len(views), 1)
    images = torch.stack([view for view in views if isinstance(view, Tensor)])
    found: Tensor = network(images.to(device)).softmax(dim=1).cpu()
    rows = torch.zeros(len(views), found.shape[1])
    rows[good] = found
    return rows


class _Images(Dataset["Tensor | str"]):
    """The view of each image, or why there is none."""

    def __init__(self, paths: list[Path], transform: Transform) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return self.transform.view(self.paths[i])
        except ImageError as error:
            return error.reason
        except OSError as error:
            return str(error)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` as they are, and the images below the folders, in order of their names.

    Raises:
        UserError: a path that does not exist, or no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders.sort()
                found += [Path(folder, name) for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    if not found:
        raise UserError(f"no image below {', '.join(map(str, paths))}; looked for {', '.join(IMG_EXTENSIONS)}")
    return found


@contextlib.contextmanager
def _open(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    # Whole or not at all: a CSV that ends in the middle looks like a shorter one.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", newline="") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
