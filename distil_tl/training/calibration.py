"""Calibration: how often predictions are right, compared with their probabilities, and a temperature that corrects it.

All figures are computed from logits in float64, and are the same on any number of ranks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distil_tl.data.loader import Batch
from distil_tl.distributed.collectives import gather_uneven_rows, max_over_ranks, sum_over_ranks
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero

BINS = 15  # of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (2017)
MIN_IMAGES = 100  # to fit a temperature
MAX_ERROR = 0.3  # standard error of a temperature, as a share of it
LOWEST, HIGHEST = 0.05, 20.0  # temperatures
ALMOST_ALL = 0.95  # share of images that are right, from which on there are almost no mistakes
KEPT = 1 << 23  # logits of a split, over all ranks, to which a temperature is fitted
_PART = 1 << 22  # logits that are converted to float64 at once
_UNIT = 2.0**-32
_LARGEST = 2.0**40  # NLL of an image: sums of larger ones would not fit into int64

Floats = npt.NDArray[np.float64]


class CalibrationSums:
    """Sums over images, from which the figures of calibration follow.

    Each term is rounded to a multiple of 2^-32 and added as an integer, so the order of the sum does not matter.

    Args:
        device: of the logits.
        temperature: divides the logits.
    """

    def __init__(self, device: torch.device, temperature: float = 1.0) -> None:
        self.temperature = temperature
        # Of each bin: images, correct ones, confidence. Then: NLL, in whole numbers and the rest, Brier, not finite.
        self._sums = torch.zeros(3 * BINS + 4, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, predicted: Tensor, valid: Tensor) -> None:
        """Add the valid samples of a batch: logits [N, C], targets and predicted classes int64 [N], valid bool [N]."""
        size = max(1, _PART // logits.shape[1])
        for part in zip(*(torch.split(each, size) for each in (logits, targets, predicted, valid)), strict=True):
            self._add(*part)

    def _add(self, logits: Tensor, targets: Tensor, predicted: Tensor, valid: Tensor) -> None:
        logs = (logits.double() / self.temperature).log_softmax(dim=1)
        p = logs.exp()
        nll = -logs.gather(1, targets[:, None])[:, 0]
        own, confidence = (p.gather(1, each[:, None])[:, 0] for each in (targets, predicted))
        brier = (p * p).sum(dim=1) - 2 * own + 1  # of all classes: the sum of (p - y)^2
        counted = valid & (nll < _LARGEST)  # False for a NaN, too
        nll, confidence, brier = (each.where(counted, 0.0) for each in (nll, confidence, brier))
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # a bin has its upper edge
        for i, column in enumerate((counted, counted & (predicted == targets), _units(confidence))):
            self._sums[i * BINS : (i + 1) * BINS].index_add_(0, bins, column.long())
        terms = (nll.floor(), _units(nll - nll.floor()), _units(brier), valid & ~counted)
        self._sums[3 * BINS :] += torch.stack([term.long().sum() for term in terms])

    def reduce(self, info: DistInfo) -> CalibrationSums:
        """These sums over all ranks, as a new object. A collective."""
        total = CalibrationSums(torch.device("cpu"), self.temperature)
        total._sums = sum_over_ranks(info, self._sums.clone()).cpu()
        return total

    def figures(self) -> dict[str, Any]:
        """n, ece, nll, brier and bins; figures are None without images, or if a logit was not finite."""
        images, correct, confidence = self._sums[: 3 * BINS].view(3, BINS).tolist()
        whole, rest, brier, bad = self._sums[3 * BINS :].tolist()
        n, known = sum(images), bad == 0 and sum(images) > 0
        gap = sum(abs(right - units * _UNIT) for right, units in zip(correct, confidence, strict=True))
        return {
            "n": n,
            "ece": gap / n if known else None,
            "nll": (whole + rest * _UNIT) / n if known else None,
            "brier": brier * _UNIT / n if known else None,
            "bins": [
                {
                    "low": i / BINS,
                    "high": (i + 1) / BINS,
                    "n": images[i],
                    "confidence": confidence[i] * _UNIT / images[i] if images[i] else None,
                    "accuracy": correct[i] / images[i] if images[i] else None,
                }
                for i in range(BINS)
            ],
        }


def _units(values: Tensor) -> Tensor:
    return (values / _UNIT).round()


class KeptLogits:
    """The logits to which a temperature is fitted: of all images of a split, or of evenly spaced ones if it is large.

    Kept are the images whose number is a multiple of `every`: the smallest power of two with which those of all ranks
    have at most `limit` logits. A rank begins with 1, and drops images as it learns that there are more.
    """

    def __init__(self, num_classes: int, limit: int = KEPT) -> None:
        self.every = 1
        self._most = max(1, limit // num_classes)  # images
        self._numbers = [torch.empty(0, dtype=torch.int64)]  # of each batch, on the CPU
        self._count = 0  # of them
        self._rows = [torch.empty(0, 3 + num_classes)]  # on the device: valid, target, predicted class, logits

    def add(self, logits: Tensor, predicted: Tensor, batch: Batch) -> None:
        """Add a batch with its logits [N, C] and predicted classes int64 [N]."""
        labels = torch.stack([batch.valid, batch.targets, predicted], dim=1)
        chosen = (batch.indices % self.every == 0).nonzero()[:, 0]
        self._numbers.append(batch.indices[chosen])
        self._count += len(chosen)
        chosen = chosen.to(logits.device, non_blocking=True)
        # Class numbers are exact in float32 below 2^24.
        self._rows.append(torch.cat([labels[chosen].float(), logits[chosen].float()], dim=1))
        while self._count > self._most:
            self._thin(2 * self.every)

    def _thin(self, every: int) -> None:
        kept = [(numbers % every == 0).nonzero()[:, 0] for numbers in self._numbers]
        self._rows = [rows[chosen.to(rows.device)] for rows, chosen in zip(self._rows, kept, strict=True)]
        self._numbers = [numbers[chosen] for numbers, chosen in zip(self._numbers, kept, strict=True)]
        self._count, self.every = sum(map(len, kept)), every

    def leave_device(self) -> None:
        self._rows = [rows.cpu() for rows in self._rows]

    def gather(self, info: DistInfo) -> Logits:
        """Those of all ranks, on all ranks alike. A collective."""
        self._thin(int(max_over_ranks(info, self.every)))
        while int(sum_over_ranks(info, torch.tensor([self._count]))) > self._most:
            self._thin(2 * self.every)
        self.leave_device()
        numbers, rows = torch.cat(self._numbers), torch.cat(self._rows)
        # Often few ranks have all of them: of n ranks, each evaluates every n-th image.
        found = gather_uneven_rows(info, torch.cat([numbers[:, None].double(), rows.double()], dim=1))
        found = found[found[:, 0].argsort()]
        found = found[found[:, 1] == 1]
        return Logits(found[:, 4:], *found[:, 2:4].long().T)


class Logits(NamedTuple):
    """Of N images, by their number.

    Attributes:
        logits: float64 [N, C], on the CPU.
        targets, predicted: classes, int64 [N].
    """

    logits: Tensor
    targets: Tensor
    predicted: Tensor


@dataclass
class Calibration:
    """The calibration of a network on a split, as it is and with a temperature.

    Attributes:
        raw: as it is.
        calibrated: with a temperature.
        kept: logits of this rank, to fit one.
        error: the standard error of the temperature, where it was fitted here.
        reason: why there is none.
    """

    raw: CalibrationSums
    kept: KeptLogits
    calibrated: CalibrationSums | None = None
    error: float | None = None
    reason: str | None = None

    @classmethod
    def empty(cls, num_classes: int, device: torch.device, temperature: float | None) -> Calibration:
        calibrated = None if temperature is None else CalibrationSums(device, temperature)
        return cls(CalibrationSums(device), KeptLogits(num_classes), calibrated)

    def add(self, logits: Tensor, predicted: Tensor, batch: Batch) -> None:
        """Add a batch with its logits [N, C] and predicted classes int64 [N]."""
        self.raw.update(logits, batch.targets, predicted, batch.valid)
        if self.calibrated is None:
            self.kept.add(logits, predicted, batch)
        else:
            self.calibrated.update(logits, batch.targets, predicted, batch.valid)

    def reduce(self, info: DistInfo) -> Calibration:
        """With the sums over all ranks, as a new object. The kept logits leave the device. A collective."""
        self.kept.leave_device()
        calibrated = None if self.calibrated is None else self.calibrated.reduce(info)
        return Calibration(self.raw.reduce(info), self.kept, calibrated)

    @property
    def temperature(self) -> float | None:
        return None if self.calibrated is None else self.calibrated.temperature

    def figures(self, *, bins: bool = True) -> dict[str, Any]:
        """temperature, raw and calibrated, as in evaluation.json; `bins` are left out if not wanted."""
        sums = {"raw": self.raw, "calibrated": self.calibrated}
        found = {name: None if each is None else each.figures() for name, each in sums.items()}
        for figures in found.values() if not bins else ():
            if figures is not None:
                del figures["bins"]
        fitted = {key: value for key, value in (("standard_error", self.error), ("reason", self.reason)) if value}
        return {"temperature": self.temperature, **fitted, **found}

    def fit(self, info: DistInfo, split: str) -> None:
        """Fit a temperature to the kept logits, which are of `split`, and count with it. A collective."""
        kept = self.kept.gather(info)
        # On one rank: others might round otherwise.
        found = on_rank_zero(info, "fitting the temperature", lambda: best_temperature(kept, split))
        if isinstance(found, str):
            self.reason = found
            return
        temperature, self.error = found
        self.calibrated = CalibrationSums(torch.device("cpu"), temperature)
        valid = torch.ones(len(kept.logits), dtype=torch.bool)
        self.calibrated.update(kept.logits, kept.targets, kept.predicted, valid)


def best_temperature(kept: Logits, split: str) -> tuple[float, float] | str:
    """The temperature with the lowest NLL and its standard error, to six digits; or why there is none."""
    logits, targets = kept.logits.numpy(), kept.targets.numpy()
    if len(targets) < MIN_IMAGES:
        return f"{split} has {len(targets)} images, and a temperature is fitted to at least {MIN_IMAGES}"
    if logits.shape[1] == 1:
        return "there is one class"
    if not np.isfinite(logits).all():
        return "a logit is not finite"
    slopes = functools.partial(_slopes, logits, targets)
    low, high = 1 / HIGHEST, 1 / LOWEST
    if slopes(high)[0] <= 0:
        few = float((kept.predicted == kept.targets).double().mean()) >= ALMOST_ALL
        why = f"{split} has almost no mistakes" if few else "the logits differ too little"
        return f"the lower the temperature, the lower the loss: {why}"
    if slopes(low)[0] >= 0:
        return f"the higher the temperature, the lower the loss: on {split} the probabilities say nothing"
    inverse, curvature = 1.0, 0.0
    for _ in range(200):  # Newton's method, and bisection where that would leave the interval
        slope, curvature = slopes(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        before, inverse = inverse, inverse - slope / curvature if curvature > 0 else -1.0
        inverse = inverse if low < inverse < high else (low + high) / 2
        if abs(inverse - before) <= 1e-10 * before:
            break
    share = 1 / (inverse * curvature**0.5) if curvature > 0 else math.inf  # by the Fisher information
    if share > MAX_ERROR:
        return f"{split} says too little: the standard error would be {share:.0%} of the temperature {1 / inverse:.3g}"
    return float(f"{1 / inverse:.6g}"), float(f"{share / inverse:.6g}")


def _slopes(logits: Floats, targets: npt.NDArray[np.int64], inverse: float) -> tuple[float, float]:
    """First and second derivative of the NLL by the inverse temperature, in which it is convex.

    With NumPy, whose sums do not depend on the number of threads.
    """
    slope = curvature = 0.0
    size = max(1, _PART // logits.shape[1])
    for start in range(0, len(logits), size):
        z = logits[start : start + size]
        z = z - z.max(axis=1, keepdims=True)
        p = np.exp(inverse * z)
        p /= p.sum(axis=1, keepdims=True)
        mean = (p * z).sum(axis=1)
        slope += float((mean - z[np.arange(len(z)), targets[start : start + size]]).sum())
        curvature += float(((p * z * z).sum(axis=1) - mean * mean).sum())
    return slope, curvature


def with_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """The probabilities, float64 [N, C], that softmax gives for logits divided by `temperature`.

    Args:
        probabilities: float32 [N, C], of the logits as they are. The order stays, also that of equal ones.
    """
    powers = probabilities.double() ** (1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True)
