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
from distil_tl.training.metrics import in_top_five
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
        lr, weight_decay: float32 [H, 1, 1].
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
        self.lr, self.weight_decay = (
            torch.tensor(column, device=device)[:, None, None] for column in zip(*settings, strict=True)
        )
        self._optim, self._loss = optim, loss or Loss()
        self._decayed = self.weight[..., : head.in_features]  # without the bias
        self._first = torch.zeros_like(self.weight)  # AdamW's moments; the first one is SGD's buffer
        self._second = torch.zeros_like(self.weight)
        self._gradient = torch.empty_like(self.weight)  # allocated once: allocating costs more than computing
        self._largest = torch.zeros_like(self.lr)  # norm of a gradient so far; not finite if one was not
        self._steps = torch.zeros((), device="cpu")
        self._by_head = device.type == "cpu"  # on a GPU that would be a launch for each head
        self._parts = [
            ([weight], [gradient], [first], [second], each)
            for weight, gradient, first, second, each in zip(
                self.weight, self._gradient, self._first, self._second, settings, strict=True
            )
        ]

    @property
    def finite(self) -> Tensor:
        """Whether all gradients of each head were finite, bool [H]."""
        return self._largest.flatten().isfinite()

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
        torch.maximum(self._largest, norms, out=self._largest)
        if self._optim.clip_norm is not None:
            gradient *= (self._optim.clip_norm / (norms + 1e-6)).clamp(max=1)
        self._steps += 1
        if self._optim.name == "sgd":
            self._sgd(gradient, self.lr * batch.factor)
        elif self._by_head:
            self._adamw_by_head(batch.factor)
        else:
            self._adamw(gradient, self.lr * batch.factor)

    def score(self, features: Tensor, targets: Tensor, valid: Tensor, *, spread: bool = False) -> Tensor:
        """The sums of a batch for each head, as in `count_predictions`."""
        return count_predictions(self.logits(features), targets, valid, spread=spread)

    def _adamw_by_head(self, factor: float) -> None:
        """AdamW by the kernel of `AdamW(fused=True)`, which reads and writes each number once."""
        before = self.weight[..., self._decayed.shape[2] :].clone()
        # Private, but the only call of the kernel without an optimizer for each head. A test compares both.
        for weights, gradients, first, second, (lr, weight_decay) in self._parts:
            torch._fused_adamw_(
                weights, gradients, first, second, [], [self._steps], lr=lr * factor, beta1=BETAS[0], beta2=BETAS[1],
                weight_decay=weight_decay, eps=EPS, amsgrad=False, maximize=False,
            )  # fmt: skip
        # A tensor has one decay, but the bias has none.
        self.weight[..., self._decayed.shape[2] :].addcmul_(before, self.lr * self.weight_decay, value=factor)

    def _adamw(self, gradient: Tensor, lr: Tensor) -> None:
        self._decayed.mul_(1 - lr * self.weight_decay)
        self._first.lerp_(gradient, 1 - BETAS[0])
        self._second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        # weight -= lr * m / (sqrt(v) + eps), with bias-corrected m and v. Dividing by -1/lr saves a pass.
        steps = int(self._steps)
        lr = -lr / (1 - BETAS[0] ** steps)
        below = torch.sqrt(self._second, out=gradient).div_(lr * math.sqrt(1 - BETAS[1] ** steps)).add_(EPS / lr)
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
    in_top = in_top_five(logits, own)
    counted = valid[:, None].expand(right.shape).double()
    columns = ((losses * valid[:, None]).double(), counted, right.double(), in_top * counted)
    sums = torch.stack([column.sum(dim=0) for column in columns], dim=1)
    by_class = sums.new_zeros(3, len(sums), logits.shape[2])
    for total, index, values in zip(by_class, (own, predicted, own), (right.double(), counted, counted), strict=True):
        total.scatter_add_(1, index.T, values.T)
    more = [count_spread(losses, predicted, targets, valid, logits.shape[2])] if spread else []
    return torch.cat([sums, *by_class, *more], dim=1)
