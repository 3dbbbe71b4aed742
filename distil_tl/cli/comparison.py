"""Two models on the same images: who is right where, and whether the difference may be chance."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distil_tl.cli.predictions import file_loader, predict_all, predict_batch
from distil_tl.data.config import SPLIT_FILE
from distil_tl.data.find_splits import find_split
from distil_tl.data.index import Index
from distil_tl.data.split_file import splits_of
from distil_tl.data.splits import data_root
from distil_tl.inference import RestoredModel, restore_model
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import json_text
from distil_tl.utils.intervals import Interval, plus_minus, wilson
from distil_tl.utils.log import Progress, printable, table
from distil_tl.utils.outputs import open_output

BATCH_SIZE = 32


@dataclass(frozen=True)
class Pairs:
    """How often both, one or none of two models is right.

    Attributes:
        both, only_first, only_second, none: numbers of images.
    """

    both: int
    only_first: int
    only_second: int
    none: int

    @property
    def n(self) -> int:
        return self.both + self.only_first + self.only_second + self.none

    @property
    def accuracies(self) -> tuple[float, float]:
        return (self.both + self.only_first) / self.n, (self.both + self.only_second) / self.n

    @property
    def intervals(self) -> tuple[Interval | None, Interval | None]:
        """95 % of each accuracy, by Wilson (1927)."""
        return wilson(self.both + self.only_first, self.n), wilson(self.both + self.only_second, self.n)

    @property
    def p_value(self) -> float:
        """McNemar's exact test (1947): the probability of a division at least as uneven, if both are equally good."""
        flipped, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        logs = [math.lgamma(flipped + 1) - math.lgamma(i + 1) - math.lgamma(flipped - i + 1) for i in range(fewer + 1)]
        return min(1.0, 2 * math.fsum(math.exp(log - flipped * math.log(2)) for log in logs))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the difference second - first, by the adjusted Wald interval of Agresti and Min (2005)."""
        n, first, second = self.n + 2, self.only_first + 0.5, self.only_second + 0.5
        difference = (second - first) / n
        half = 1.959964 * math.sqrt((first + second) - (second - first) ** 2 / n) / n
        return max(-1.0, difference - half), min(1.0, difference + half)


def count_pairs(targets: np.ndarray, first: np.ndarray, second: np.ndarray) -> Pairs:
    """Targets and predictions, int64 [N] each."""
    a, b = first == targets, second == targets
    return Pairs(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


# Seven parameters: those of the command.
def compare(
    runs: tuple[Path, Path],
    split: str,
    data: Path | None,
    *,
    checkpoint: str,
    json_file: Path | None,
    images: int,
    device: str,
) -> None:
    """Predict the images of a split with both models; print the result, and write it to `json_file` if given.

    Args:
        data: the folder with the split; None: that of the first run.
        images: how many flipped images to print.
        device: auto, cpu or cuda.

    Raises:
        UserError: no such run, checkpoint, split or device, the models have other classes, or no image can be read.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    first, second = (restore_model(run, checkpoint) for run in runs)
    if first.classes != second.classes:
        differing = sorted(set(first.classes) ^ set(second.classes))
        raise UserError(
            f"{runs[0]} and {runs[1]} have other classes ({', '.join(map(printable, differing[:5]))}): "
            f"only models of the same classes can be compared"
        )
    index = images_of(first, runs[0], split, data)
    files = [index.path(i) for i in range(len(index))]
    for model, run in zip((first, second), runs, strict=True):
        warn_if_trained_on(files, model, run)
    predicted = [
        predict_split(model, index, where, f"predict {run}") for model, run in zip((first, second), runs, strict=True)
    ]
    readable = (predicted[0] >= 0) & (predicted[1] >= 0)
    if not readable.any():
        raise UserError(f"none of the {len(index)} images of {split} can be read")
    if not readable.all():
        sys.stderr.write(f"distil-tl compare: {(~readable).sum()} of {len(index)} images can't be read; left out\n")
    content = comparison(index, predicted[0], predicted[1], readable)
    names = [f"{model.checkpoint.name} of {run}" for model, run in zip((first, second), runs, strict=True)]
    content = {"first": names[0], "second": names[1], "split": split, **content}
    if json_file is not None:
        with open_output(json_file) as file:
            file.write(json_text(content))
    sys.stdout.write(as_text(content, images, own=data is None and checkpoint == "best"))


def images_of(model: RestoredModel, run_dir: Path, split: str, data: Path | None) -> Index:
    """The images of a split of a run, or of the folder `data`, as `distil-tl evaluate` finds them. Raises UserError."""
    config = model.config.data
    if data is not None:
        config = dataclasses.replace(config, root=str(data), labels=None)
    elif config.root is not None and not Path(config.root).is_dir():
        raise UserError(
            f"data.root={printable(config.root)} of {printable(run_dir)} is not a folder; if the images were moved, "
            f"add --data NEW_FOLDER"
        )
    return find_split(config, data_root(config), split, model.classes, run_dir)


def warn_if_trained_on(files: list[Path], model: RestoredModel, run_dir: Path) -> None:
    """Say so if a run was trained on some of these images, as it divided them otherwise."""
    kept, root = run_dir / SPLIT_FILE, model.config.data.root
    if root is None or not kept.is_file():
        return
    if trained := splits_of(kept, Path(root), files).count("train"):
        sys.stderr.write(
            f"distil-tl compare: {printable(run_dir)} was trained on {trained} of these {len(files)} images, so its "
            f"figures are too good; compare runs with the same split\n"
        )


def predict_split(model: RestoredModel, index: Index, device: torch.device, label: str) -> np.ndarray:
    """Predicted classes of the images, int64 [N]; -1 for one that can't be read."""
    network = model.network(device)
    probabilities = functools.partial(predict_batch, network, device)
    files = [index.path(i) for i in range(len(index))]
    loader = file_loader(files, model.transform(), BATCH_SIZE, None, pin_memory=device.type == "cuda")
    with Progress(label, len(index), show=True) as bar:
        found = [-1 if isinstance(p, str) else int(p.argmax()) for p in predict_all(probabilities, loader, bar)]
    return np.array(found, dtype=np.int64)


def comparison(index: Index, first: np.ndarray, second: np.ndarray, readable: np.ndarray) -> dict[str, Any]:
    """All figures, for JSON: overall, by class, and the images that only one model classifies correctly.

    Args:
        first, second: predicted classes, int64 [N].
        readable: which images count, bool [N].
    """
    pairs = count_pairs(index.targets[readable], first[readable], second[readable])
    per_class = []
    for target, name in enumerate(index.classes):
        chosen = readable & (index.targets == target)
        if chosen.any():
            of_class = count_pairs(index.targets[chosen], first[chosen], second[chosen])
            figures = {"n": of_class.n, "top1": of_class.accuracies, "top1_intervals": of_class.intervals}
            per_class.append({"class": name, **figures, **asdict(of_class)})
    right = (first == index.targets).astype(int) - (second == index.targets).astype(int)
    flipped = [
        {
            "path": index.relative_path(int(i)),
            "class": index.classes[index.targets[i]],
            "first": index.classes[first[i]],
            "second": index.classes[second[i]],
        }
        for i in np.flatnonzero(readable & (right != 0))
    ]
    return {
        "n": pairs.n,
        "top1": pairs.accuracies,
        "top1_intervals": pairs.intervals,
        **asdict(pairs),
        "difference": pairs.accuracies[1] - pairs.accuracies[0],
        "interval": pairs.interval,
        "p_value": pairs.p_value,
        "per_class": per_class,
        "flipped": flipped,
    }


def as_text(content: dict[str, Any], images: int, *, own: bool) -> str:
    """The comparison as it is printed.

    Args:
        images: the most flipped images to list.
        own: whether the images and the checkpoints are those by which the runs were judged.
    """
    low, high = content["interval"]
    lines = [
        f"first:  {printable(content['first'])}",
        f"second: {printable(content['second'])}",
        f"{content['split']}, {content['n']} images",
        "",
        table(
            [
                [
                    printable(row["class"]),
                    str(row["n"]),
                    *map(plus_minus, row["top1"], row["top1_intervals"]),
                    _signed(*row["top1"]),
                ]
                for row in [*content["per_class"], {**content, "class": "all"}]
            ],
            ["class", "n", "first", "second", "difference"],
        ),
        "\u00b1: half the width of the 95 % interval (Wilson)",
        "",
        f"right: both {content['both']}, only first {content['only_first']}, only second {content['only_second']}, "
        f"none {content['none']}",
        f"difference {content['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, "
        f"p = {content['p_value']:.3g} (McNemar, exact): {_verdict(content)}",
    ]
    if content["split"] == "val" and own:
        lines.append("val chose the epochs of both runs; if there is a test split, --split test is fairer")
    flipped = content["flipped"]
    if flipped and images:
        rows = [[printable(row[key]) for key in ("path", "class", "first", "second")] for row in flipped[:images]]
        lines += ["", f"{min(images, len(flipped))} of {len(flipped)} images that only one gets right:", ""]
        lines += [table(rows, ["path", "class", "first", "second"])]
    return "\n".join(lines) + "\n"


def _signed(first: float, second: float) -> str:
    return f"{second - first:+.4f}"


def _verdict(content: dict[str, Any]) -> str:
    if content["p_value"] >= 0.05:
        return "not significant at 5 %"
    return f"the {'second' if content['difference'] > 0 else 'first'} is better on such images"
