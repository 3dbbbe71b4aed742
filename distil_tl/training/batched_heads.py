"""Many linear heads trained at once on the same features, each with its own learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.training.config import OptimConfig
from distil_tl.training.losses import Loss
from distil_tl.training.spread import count_spread

# A smaller slope counts as 0. It is far below what float32 resolves here, and its square is a slow denormal on CPUs.
SMALLEST_SLOPE = 1e-12
BETAS, EPS = (0.9, 0.999), 1e-8  # the defaults of torch.optim.AdamW


class HeadSettings(NamedTuple):
    """Learning rate and weight decay of one head."""

    lr: float
    weight_decay: float


class HeadBatch(NamedTuple):
    """A global batch, shared by all heads.

    Attributes:
        features: float32 [B, K], after the dropout, with a last column of ones where the head has a bias.
        targets: float32 [B, C], smoothed.
        shares: float32 [B], weight of each image in the loss; 0 where it is left out.
        factor: of the learning rates, from the schedule.
    """

    features: Tensor
    targets: Tensor
    shares: Tensor
    factor: float


class BatchedHeads:
    """H copies of a linear head, each with its own settings, trained by the closed form of their gradient.

    Attributes:
        weight: float32 [H, C, K]; the bias, if any, is the last column.
        finite: bool [H], whether all gradients were finite.
    """

    def __init__(
        self,
        head: nn.Linear,
        settings: Sequence[HeadSettings],
        optim: OptimConfig,
        device: torch.device,
        loss: Loss | None = None,
    ) -> None:
        weight = head.weight.detach()
        columns = weight if head.bias is None else torch.cat([weight, head.bias.detach()[:, None]], dim=1)
        self.weight = columns.to(device, torch.float32).repeat(len(settings), 1, 1)
        self.finite = torch.ones(len(settings), dtype=torch.bool, device=device)
        self.lr, self.weight_decay = (
            torch.tensor(column, device=device)[:, None, None] for column in zip(*settings, strict=True)
        )
        self._optim, self._loss = optim, loss or Loss()
        self._decayed = self.weight[..., : head.in_features]  # without the bias
        self._first = torch.zeros_like(self.weight)  # AdamW's moments; the first one is SGD's buffer
        self._second = torch.zeros_like(self.weight)
        self._gradient = torch.empty_like(self.weight)  # allocated once: allocating costs more than computing
        self._steps = 0

    def logits(self, features: Tensor) -> Tensor:
        """[B, K] to [B, H, C]."""
        heads, classes, _ = self.weight.shape
        return (features @ self.weight.flatten(0, 1).T).view(-1, heads, classes)

    def step(self, batch: HeadBatch) -> None:
        probabilities = self._loss.adjusted(self.logits(batch.features)).softmax(dim=2)
        slopes = F.hardshrink(self._loss.slopes(probabilities, batch.targets), SMALLEST_SLOPE)
        slopes *= batch.shares[:, None, None]
        torch.mm(slopes.flatten(1).T, batch.features, out=self._gradient.flatten(0, 1))
        gradient = self._gradient
        norms = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
        self.finite &= norms.flatten().isfinite()
        if self._optim.clip_norm is not None:
            gradient *= (self._optim.clip_norm / (norms + 1e-6)).clamp(max=1)
        self._steps += 1
        if self._optim.name == "sgd":
            self._sgd(gradient, self.lr * batch.factor)
        else:
            self._adamw(gradient, self.lr * batch.factor)

    def score(self, features: Tensor, targets: Tensor, valid: Tensor, *, spread: bool = False) -> Tensor:
        """The sums of a batch for each head, as in `count_predictions`."""
        return count_predictions(self.logits(features), targets, valid, spread=spread)

    def _adamw(self, gradient: Tensor, lr: Tensor) -> None:
        self._decayed.mul_(1 - lr * self.weight_decay)
        self._first.lerp_(gradient, 1 - BETAS[0])
        self._second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        # weight -= lr * m / (sqrt(v) + eps), with bias-corrected m and v. Dividing by -1/lr saves a pass.
        lr = -lr / (1 - BETAS[0] ** self._steps)
        below = torch.sqrt(self._second, out=gradient).div_(lr * math.sqrt(1 - BETAS[1] ** self._steps)).add_(EPS / lr)
        self.weight.addcdiv_(self._first, below)

    def _sgd(self, gradient: Tensor, lr: Tensor) -> None:
        momentum = self._optim.momentum
        gradient[..., : self._decayed.shape[2]].addcmul_(self._decayed, self.weight_decay)
        if momentum:
            self._first.mul_(momentum).add_(gradient)
            gradient.add_(self._first, alpha=momentum)
        self.weight.addcmul_(gradient, -lr)


def count_predictions(logits: Tensor, targets: Tensor, valid: Tensor, *, spread: bool = False) -> Tensor:
    """The sums of a batch for each head, float64 [H, 4 + 3 C], as in `ClassificationMetrics.of`.

    With `spread` they are followed by what else a `Spread` has.

    Args:
        logits: [B, H, C].
        targets: int64 [B].
        valid: bool [B].
    """
    predicted, own = logits.argmax(dim=2), targets[:, None].expand(logits.shape[:2])
    losses = F.cross_entropy(logits.transpose(1, 2), own, reduction="none")
    right = (predicted == own) * valid[:, None]
    above = (logits > logits.gather(2, own[..., None])).sum(dim=2)
    counted = valid[:, None].expand(right.shape).double()
    columns = ((losses * valid[:, None]).double(), counted, right.double(), (above < 5) * counted)
    sums = torch.stack([column.sum(dim=0) for column in columns], dim=1)
    by_class = sums.new_zeros(3, len(sums), logits.shape[2])
    for total, index, values in zip(by_class, (own, predicted, own), (right.double(), counted, counted), strict=True):
        total.scatter_add_(1, index.T, values.T)
    more = [count_spread(losses, predicted, targets, valid, logits.shape[2])] if spread else []
    return torch.cat([sums, *by_class, *more], dim=1)
