"""Predictions of a trained model for image files."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distil_tl.cli.prediction_rows import RowFormat, write_rows
from distil_tl.data.config import ALL_EXTENSIONS, IMG_EXTENSIONS, SPLIT_FILE, default_workers
from distil_tl.data.decode import ImageError
from distil_tl.data.intensity import intensity_warning
from distil_tl.data.loader import Batch, Item, collate
from distil_tl.data.loader_processes import BoundedLoader
from distil_tl.data.split_file import splits_of
from distil_tl.data.walk import describe, walk
from distil_tl.export.names import ONNX
from distil_tl.export.onnx_model import OnnxModel
from distil_tl.inference import Transform, restore_model
from distil_tl.training.calibration import with_temperature
from distil_tl.training.network import Network
from distil_tl.utils.errors import UserError, listed
from distil_tl.utils.log import Progress, printable
from distil_tl.utils.outputs import check_output, open_output
from distil_tl.utils.threads import available_cpus


# Ten parameters: those of the command.
def predict(
    model: Path,
    paths: Sequence[Path],
    *,
    checkpoint: str,
    calibrated: bool,
    output: Path | None,
    split: str | None,
    rows: RowFormat,
    batch_size: int,
    workers: int | None,
    device: str,
) -> int:
    """Write a row for each image among `paths` to `output` (None: standard output). Returns how many can't be read.

    Args:
        model: a run directory, or an ONNX file that `distil-tl export` wrote.
        calibrated: divide logits by the temperature of the run, if it has one.
        split: only images in this split of the run; None: all.
        rows: what a row has.
        workers: loader processes; None: one fewer than the CPUs.
        device: auto, cpu or cuda.

    Raises:
        UserError: no such run, checkpoint, path or device, no image among the paths, none that can be read, or an
            output that can't be written.
    """
    if model.suffix == ONNX:
        predictor = onnx_predictor(model, device)
    else:
        predictor = trained_predictor(model, checkpoint, device, calibrated=calibrated)
    ignored: Counter[str] = Counter()
    files = find_images(paths, predictor.extensions, ignored)
    if predictor.root is not None and (model / SPLIT_FILE).is_file():
        # Images that were moved are found by their paths below the folder that is given.
        moved = not predictor.root.is_dir() and len(paths) == 1 and paths[0].is_dir()
        root = paths[0] if moved else predictor.root
        files = of_split(files, splits_of(model / SPLIT_FILE, root, files), split, root)
    if output is not None:
        check_output("--output", output, [model, *files], ALL_EXTENSIONS)
    if twice := given_twice(files):
        sys.stderr.write(f"distil-tl predict: {twice}\n")
    if ignored:
        sys.stderr.write(f"distil-tl predict: {printable(describe(ignored))}\n")
    if warning := intensity_warning(len(files), files.__getitem__, predictor.transform.intensity):
        sys.stderr.write(f"distil-tl predict: {warning}\n")
    loader = file_loader(files, predictor.transform, batch_size, workers, pin_memory=predictor.pin_memory)
    bar = Progress("predict", len(files), show=output is not None)
    with open_output(output) as file:
        predictions = predict_all(predictor.probabilities, loader, bar)
        unreadable = write_rows(file, files, predictions, predictor.classes, rows)
    bar.close()
    if output is not None:
        sys.stderr.write(f"distil-tl predict: {len(files):,} rows in {printable(output)}\n")
    if unreadable:
        sys.stderr.write(f"distil-tl predict: {unreadable} of {len(files)} files can't be read; see `error`\n")
    if unreadable == len(files):
        raise UserError("none of the files is a readable image")
    return unreadable


@dataclass(frozen=True)
class Predictor:
    """A model that predicts classes.

    Attributes:
        classes: names, in the order of the probabilities.
        transform: from an image to the input of the model.
        extensions: how the names of images end.
        probabilities: of images uint8 [N, 3, S, S] on the CPU, float [N, C] on the CPU.
        pin_memory: whether batches should be in pinned memory.
        root: the images that the run was trained on are below this folder; None if it is not known.
    """

    classes: list[str]
    transform: Transform
    extensions: tuple[str, ...]
    probabilities: Callable[[Tensor], Tensor]
    pin_memory: bool = False
    root: Path | None = None


def trained_predictor(run_dir: Path, checkpoint: str, device: str, *, calibrated: bool) -> Predictor:
    """The model of a run directory, in the precision that it was trained in."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device")
    restored = restore_model(run_dir, checkpoint)
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    network = restored.network(where)
    temperature = restored.temperature if calibrated else None
    probabilities = functools.partial(predict_batch, network, where, temperature=temperature)
    extensions = restored.config.data.image_extensions
    root = None if restored.config.data.root is None else Path(restored.config.data.root)
    return Predictor(restored.classes, restored.transform(), extensions, probabilities, where.type == "cuda", root)


def onnx_predictor(path: Path, device: str) -> Predictor:
    """The model of an ONNX file that `distil-tl export` wrote."""
    model = OnnxModel(path, device)
    transform = Transform(model.preprocess, model.image_size, model.intensity)
    return Predictor(model.classes, transform, model.extensions, lambda images: torch.from_numpy(model(images.numpy())))


def of_split(files: list[Path], splits: Sequence[str | None], split: str | None, root: Path) -> list[Path]:
    """The files in a split of the run. Without one, all of them, and a warning if the run was trained on some."""
    if split is not None:
        files = [file for file, own in zip(files, splits, strict=True) if own == split]
        if not files:
            raise UserError(
                f"none of the images is in {split} of the run, which names them by their paths below {printable(root)}"
            )
    elif trained := sum(own == "train" for own in splits):
        sys.stderr.write(
            f"distil-tl predict: the model was trained on {trained} of these {len(files)} images; --split val leaves "
            f"them out\n"
        )
    return files


def find_images(
    paths: Sequence[Path], extensions: tuple[str, ...] = IMG_EXTENSIONS, ignored: Counter[str] | None = None
) -> list[Path]:
    """The files in `paths`, with any extension, and those inside its folders with one of `extensions`, sorted by name.

    Args:
        ignored: counts what is left out of the folders, by ending.

    Raises:
        UserError: a path does not exist, there is no image at all, or an error of `walk`.
    """
    ignored = Counter() if ignored is None else ignored
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            for folder, images in walk(path, "", extensions, ignored):
                files += [path / folder / image.name for image in images]
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no file or folder {printable(path)}")
    if not files:
        left_out = f" ({describe(ignored)})" if ignored else ""
        names = ", ".join(map(printable, paths))
        raise UserError(f"no image in {names}{left_out}; image files end in {', '.join(extensions)}")
    return files


def given_twice(files: Sequence[Path]) -> str:
    """How many of the files were given more than once, in words; empty if none was."""
    counts = Counter(map(os.path.abspath, files))
    again = [path for path, count in counts.items() if count > 1]
    if not again:
        return ""
    images = "1 image is" if len(again) == 1 else f"{len(again):,} images are"
    return f"{images} given more than once, with a row each time ({listed([printable(path) for path in again], 3)})"


class ImageFiles(Dataset[Item]):
    """For each file the network's input, uint8 [3, S, S], or the reason why the file can't be read."""

    def __init__(self, files: list[Path], transform: Transform) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        try:
            return Item(self.transform.view(self.files[i]), -1, i, None)
        except ImageError as error:
            return Item(None, -1, i, error.reason)
        except OSError as error:
            return Item(None, -1, i, str(error))


def file_loader(
    files: list[Path], transform: Transform, batch_size: int, workers: int | None, *, pin_memory: bool
) -> BoundedLoader[Batch]:
    """The files as batches for a model; `workers` as in `predict`."""
    return BoundedLoader[Batch](
        ImageFiles(files, transform),
        batch_size=batch_size,
        num_workers=default_workers(available_cpus()) if workers is None else workers,
        collate_fn=functools.partial(collate, image_size=transform.image_size),
        pin_memory=pin_memory,
    )


def predict_all(
    probabilities: Callable[[Tensor], Tensor], loader: Iterable[Batch], bar: Progress
) -> Iterator[Tensor | str]:
    """For each file the probabilities of its image, float [C] on the CPU, or the reason why it can't be read.

    Args:
        probabilities: float [N, C] on the CPU, of images uint8 [N, 3, S, S] on the CPU.
    """
    for batch in loader:
        readable = batch.images[batch.valid] if batch.faults else batch.images
        results = iter(probabilities(readable) if len(readable) else ())
        reasons = dict(batch.faults)
        yield from (reasons[i] if i in reasons else next(results) for i in batch.indices.tolist())
        bar.advance(len(batch.indices))


@torch.inference_mode()
def predict_batch(
    network: Network, device: torch.device, images: Tensor, *, temperature: float | None = None
) -> Tensor:
    """Probabilities [N, C] on the CPU, of images uint8 [N, 3, S, S]: float32, or float64 with a temperature."""
    probabilities: Tensor = network(images.to(device, non_blocking=True)).softmax(dim=1).cpu()
    return probabilities if temperature is None else with_temperature(probabilities, temperature)
