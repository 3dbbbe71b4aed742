"""The training loss of each image, and what it does about classes of unequal size.

Evaluations always report the plain cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.training.config import OptimConfig


@dataclass(frozen=True)
class Loss:
    """Cross-entropy or focal loss of each image, weighted by its class or with adjusted logits.

    Attributes:
        smoothing: label smoothing.
        gamma: of the focal loss of Lin et al. (2017), `(1 - p) ** gamma * cross-entropy` with p the probability of the
            target; None: cross-entropy.
        weights: of the classes, float32 [C]; None: all 1.
        offsets: added to the logits, float32 [C]; None: 0.
    """

    smoothing: float = 0.0
    gamma: float | None = None
    weights: Tensor | None = None
    offsets: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses [N] of logits [N, C] and targets int64 [N]."""
        losses = F.cross_entropy(self.adjusted(logits), targets, label_smoothing=self.smoothing, reduction="none")
        if self.gamma is not None:
            losses = (1 - torch.exp(-losses)) ** self.gamma * losses
        return self.weighted(losses, targets)

    def adjusted(self, logits: Tensor) -> Tensor:
        return logits if self.offsets is None else logits + self.offsets

    def weighted(self, values: Tensor, targets: Tensor) -> Tensor:
        """`values` [N] times the weight of each image's class."""
        return values if self.weights is None else values * self.weights[targets]

    def slopes(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """The gradient with respect to the logits, [N, H, C], without class weights.

        Args:
            probabilities: softmax of the adjusted logits of H heads, [N, H, C].
            targets: smoothed, float32 [N, C].
        """
        slopes = probabilities - targets[:, None]
        if self.gamma is None:
            return slopes
        p = (probabilities * targets[:, None]).sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return slopes * ((1 - p) ** self.gamma - self.gamma * p * (1 - p) ** (self.gamma - 1) * p.log())


def training_loss(optim: OptimConfig, balance: str, counts: np.ndarray, device: torch.device) -> Loss:
    """The loss that `optim` and `data.balance` describe.

    Args:
        counts: training images of each class, int64 [C].
    """
    weights = offsets = None
    if balance == "weights":
        weights = 1 / counts
    elif balance == "effective_number":  # Cui et al. (2019)
        weights = (1 - optim.effective_beta) / (1 - optim.effective_beta**counts)
    elif balance == "logit_adjust":  # Menon et al. (2021), with tau = 1
        offsets = np.log(counts / counts.sum())
    if weights is not None:  # so that an image has weight 1 on average, and learning rates keep their meaning
        weights = weights * counts.sum() / (weights * counts).sum()

    def tensor(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32, device=device)

    gamma = optim.focal_gamma if optim.loss == "focal" else None
    return Loss(optim.label_smoothing, gamma, tensor(weights), tensor(offsets))
