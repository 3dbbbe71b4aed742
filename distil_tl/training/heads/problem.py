"""What heads are fitted to: standardised features of train with their classes, and sums that several heads need."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from distil_tl.training.heads.rows import TOO_LITTLE_MEMORY, Group, Part, Rows, Standard
from distil_tl.utils.errors import NonFiniteError, UserError

CONSTANT = 1e-6  # a smaller deviation, relative to the largest one or to the mean, counts as none


@dataclass(frozen=True)
class Moments:
    """Weighted sums over standardised rows.

    Attributes:
        mean: [D]. Where all weights are equal it is 0.
        class_weight: of the images of each class, [C].
        class_sum: of their features, [C, D].
    """

    mean: Tensor
    class_weight: Tensor
    class_sum: Tensor

    @property
    def weight(self) -> Tensor:
        """Of all images."""
        return self.class_weight.sum()

    @property
    def class_mean(self) -> Tensor:
        """[C, D]; 0 for a class without images."""
        return self.class_sum / self.class_weight.clamp(min=torch.finfo(torch.float64).tiny)[:, None]


@dataclass
class Problem:
    """The training images of a fit. What is computed once is kept.

    Attributes:
        rows: standardised.
        standard: with which they are.
        counts: usable images of each class, [C].
        smoothing: label smoothing of losses.
        offsets: added to logits in losses, [C]; None: 0.
        seed: of fits that draw random numbers.
    """

    rows: Rows
    standard: Standard
    counts: Tensor
    smoothing: float = 0.0
    offsets: Tensor | None = None
    seed: int = 0

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def width(self) -> int:
        return len(self.standard.mean)

    @property
    def group(self) -> Group:
        return self.rows.group

    @functools.cached_property
    def moments(self) -> Moments:
        def of(part: Part) -> Tensor:
            one_hot = part.one_hot(self.classes) * part.weights[:, None]
            return torch.cat([one_hot.sum(dim=0)[:, None], one_hot.T @ part.features.double()], dim=1)

        sums = self.rows.total((self.classes, 1 + self.width), of)
        weight, features = sums[:, 0], sums[:, 1:]
        return Moments(features.sum(dim=0) / weight.sum(), weight, features)

    @functools.cached_property
    def second_moment(self) -> Tensor:
        """The weighted mean of the outer products of features, [D, D]."""

        def of(part: Part) -> Tensor:
            features = part.features.double()
            return (features * part.weights[:, None]).T @ features

        return self.rows.total((self.width, self.width), of) / self.moments.weight

    @functools.cached_property
    def everything(self) -> Part:
        """All rows on every rank. A collective. Raises UserError on all ranks alike if memory does not suffice."""
        return self._all_rows(on_all=True)

    def everything_on_main(self) -> Part:
        """The same on rank 0 alone; without rows on the others. It is not kept."""
        return self.__dict__.get("everything") or self._all_rows(on_all=False)

    def _all_rows(self, *, on_all: bool) -> Part:
        found = self.rows.everything(on_all=on_all)
        if found is None:
            raise UserError(f"{TOO_LITTLE_MEMORY} for the features of all training images: use a linear head")
        return found


def open_problem(
    raw: Rows, classes: int, smoothing: float = 0.0, offsets: Tensor | None = None, seed: int = 0
) -> Problem:
    """A problem with the features of `raw`, standardised. A collective.

    Raises:
        UserError: no image can be used, or memory does not suffice.
        NonFiniteError: of the features.
        AllRanksStopError: on all ranks alike.
    """
    width = raw.width

    def of(part: Part) -> Tensor:
        features = part.features.double()
        sums = torch.cat([features.sum(dim=0), features.square().sum(dim=0)])
        return torch.cat([sums, part.one_hot(classes).sum(dim=0)])

    sums = raw.total((2 * width + classes,), of)
    counts = sums[2 * width :]
    if counts.sum() == 0:
        raise UserError("no image of train can be used; repair them")
    if not sums.isfinite().all():
        raise NonFiniteError("features of train are not finite: use another precision")
    mean = sums[:width] / counts.sum()
    deviation = (sums[width : 2 * width] / counts.sum() - mean.square()).clamp(min=0).sqrt()
    # Features are float32, so a deviation that is tiny beside the mean is rounding.
    deviation = torch.where(deviation > CONSTANT * torch.maximum(deviation.max(), mean.abs()), deviation, 1.0)
    standard = Standard(mean, deviation)
    rows = raw.standardized(standard)
    if not rows.load_own():
        raise UserError(f"{TOO_LITTLE_MEMORY} for its share of the features: use a linear head, or more nodes")
    return Problem(rows, standard, counts, smoothing, offsets, seed)
