"""Do two networks answer the same? PyTorch and onnxruntime on every image of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distil_tl.data.index import Index
from distil_tl.data.loader import Batch
from distil_tl.export import predict
from distil_tl.utils.errors import ExportError, listed
from distil_tl.utils.log import Progress, logger, printable

# Of two probabilities of the same class in float32. Different orders of summation give 1e-7 to 1e-5; anything that is
# really wrong, such as another normalisation, gives 1e-2 or more.
MOST = 1e-3
_SHOWN = 20  # images in a message

Answers = npt.NDArray[np.float32]


class Answer(NamedTuple):
    """The answers for one image.

    Attributes:
        image: its number in the split.
        expected, found: the classes by PyTorch and by onnxruntime.
        margin: between PyTorch's two highest probabilities.
        difference: the largest of a probability.
    """

    image: int
    expected: int
    found: int
    margin: float
    difference: float


@dataclass
class Comparison:
    """The answers for all images of a split."""

    answers: list[Answer] = field(default_factory=list)

    def add(self, indices: list[int], expected: Answers, found: Answers) -> None:
        """Add a batch of N images with their probabilities [N, C]."""
        highest = -np.partition(-expected, 1, axis=1)[:, :2] if expected.shape[1] > 1 else expected
        margins = highest[:, 0] - highest[:, 1] if expected.shape[1] > 1 else np.ones(len(expected))
        differences = np.abs(expected - found).max(axis=1)
        columns = (indices, expected.argmax(1), found.argmax(1), margins, differences)
        self.answers += [
            Answer(int(i), int(e), int(f), float(m), float(d)) for i, e, f, m, d in zip(*columns, strict=True)
        ]

    @property
    def difference(self) -> float:
        """The largest difference of a probability; not finite if one of them is not."""
        return float(np.max([answer.difference for answer in self.answers]))

    @property
    def near_ties(self) -> list[Answer]:
        """Images whose class rounding decides: PyTorch's own margin is below the largest difference."""
        return [answer for answer in self.answers if answer.margin < self.difference]

    @property
    def wrong(self) -> list[Answer]:
        """Images with another class, though PyTorch's margin is not below the largest difference."""
        return [a for a in self.answers if a.expected != a.found and not a.margin < self.difference]


def compare(
    expected: Callable[[Tensor], Tensor],
    found: Callable[[npt.NDArray[np.uint8]], Answers],
    batches: Iterable[Batch],
    length: int,
    temperature: float | None = None,
) -> Comparison:
    """The answers for `length` images in batches.

    Args:
        expected: PyTorch's network, from uint8 images on the CPU to logits.
        found: from the same images to probabilities.
        temperature: divides the logits.
    """
    comparison = Comparison()
    with torch.inference_mode(), Progress("check", length, show=True) as bar:
        for batch in batches:
            images = batch.images[batch.valid]
            if len(images):
                probabilities = (expected(images) / (temperature or 1.0)).softmax(dim=1).numpy()
                comparison.add(batch.indices[batch.valid].tolist(), probabilities, found(images.numpy()))
            bar.advance(len(batch.images))
    return comparison


def judge(comparison: Comparison, index: Index, split: str, classes: list[str]) -> None:
    """Log what was compared, and the images whose class rounding decides.

    Raises:
        ExportError: a class differs without that reason, or a probability differs too much.
    """

    def shown(answer: Answer) -> str:
        other = "the same" if answer.expected == answer.found else f"onnxruntime {printable(classes[answer.found])}"
        name, own = printable(index.relative_path(answer.image)), printable(classes[answer.expected])
        return f"{name} (PyTorch {own}, margin {answer.margin:.1e}; {other})"

    difference, count = comparison.difference, len(comparison.answers)
    if not difference <= MOST:
        worst = max(comparison.answers, key=lambda a: a.difference if a.difference == a.difference else np.inf)
        raise ExportError(
            f"the ONNX model answers otherwise than PyTorch: a probability differs by {difference:.1e}, and at most "
            f"{MOST} is rounding. The worst image of {split}: {shown(worst)}. No file was written"
        )
    if comparison.wrong:
        wrong = listed([shown(answer) for answer in comparison.wrong], _SHOWN)
        raise ExportError(
            f"the ONNX model gives another class than PyTorch for {len(comparison.wrong)} of {count} images of "
            f"{split}, though no probability differs by more than {difference:.1e}: {wrong}. No file was written"
        )
    changed = sum(a.expected != a.found for a in comparison.near_ties)
    logger.info(
        "onnxruntime answers all %s images of %s as PyTorch does in float32: %s. The largest difference of a "
        "probability is %.1e", f"{count:,}", split,
        "the same class for each" if not changed else f"the same class for all but {changed}", difference,
    )  # fmt: skip
    if comparison.near_ties:
        ties = listed([shown(answer) for answer in comparison.near_ties], _SHOWN)
        logger.info("PyTorch's own margin is smaller than that for %d: %s", len(comparison.near_ties), ties)


def check_script(path_of: Callable[[int], Path], views: dict[int, Tensor], settings: dict[str, object]) -> None:
    """Compare what `predict.py` makes of images with the package's own inputs, and log the result.

    Args:
        path_of: the path of an image by its number.
        views: the inputs uint8 [3, S, S] of some images, by number.
        settings: as in the metadata of the model.

    Raises:
        ExportError: they differ by more than rounding on another processor.
    """
    same, refused, off = 0, 0, [0]
    for i, view in views.items():
        try:
            prepared = predict.prepare(path_of(i), settings)
        except predict.RefusedError:
            refused += 1
            continue
        off.append(int(np.abs(prepared.astype(np.int16) - view.numpy()).max()))
        same += off[-1] == 0
    if max(off) > 1:
        raise ExportError(
            f"predict.py prepares {len(views) - refused - same} of {len(views)} images to other bytes than the "
            f"package: they differ by up to {max(off)} of 255. No file was written. Please report "
            f"this, with the versions of Pillow, torch and torchvision"
        )
    others = f"; {refused} are of kinds that it refuses" if refused else ""
    if max(off):
        logger.warning(
            "predict.py prepares %d of %d images to bytes that differ by 1 of 255: on this processor torchvision "
            "resizes by another algorithm%s", len(views) - refused - same, len(views), others,
        )  # fmt: skip
    else:
        logger.info("predict.py prepares %d of %d images to the same bytes%s", same, len(views), others)
