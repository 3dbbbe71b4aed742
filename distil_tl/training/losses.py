"""The training loss of each image, and what it does about classes of unequal size.

Evaluations always report the plain cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.data.mixing import Partners
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
        image_weights: of the training images, float32 on the CPU, 1 on average; None: all 1.
    """

    smoothing: float = 0.0
    gamma: float | None = None
    weights: Tensor | None = None
    offsets: Tensor | None = None
    image_weights: Tensor | None = None

    def __call__(
        self, logits: Tensor, targets: Tensor, indices: Tensor | None = None, partners: Partners | None = None
    ) -> Tensor:
        """Losses [N] of logits [N, C] and targets int64 [N], of the training images `indices`, int64 [N].

        For mixed images, the losses for both targets with their weights, in the shares of both images.
        """
        losses = self._of_targets(logits, targets, indices)
        if partners is None:
            return losses
        others = self._of_targets(logits, partners.targets, partners.indices)
        return partners.shares * losses + (1 - partners.shares) * others

    def _of_targets(self, logits: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        losses = F.cross_entropy(self.adjusted(logits), targets, label_smoothing=self.smoothing, reduction="none")
        if self.gamma is not None:
            losses = (1 - torch.exp(-losses)) ** self.gamma * losses
        return self.weighted(losses, targets, indices)

    def adjusted(self, logits: Tensor) -> Tensor:
        return logits if self.offsets is None else logits + self.offsets

    def weighted(self, values: Tensor, targets: Tensor, indices: Tensor | None = None) -> Tensor:
        """`values` [N] times the weight of each image and of its class."""
        if self.image_weights is not None and indices is not None:
            values = values * self.image_weights[indices.cpu()].to(values.device)
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


def training_loss(
    optim: OptimConfig, balance: str, counts: np.ndarray, device: torch.device, weights: np.ndarray | None = None
) -> Loss:
    """The loss that `optim` and `data.balance` describe.

    Args:
        counts: training images of each class, int64 [C].
        weights: of the training images, float32 [N]; None: all count alike.
    """
    of_classes = offsets = None
    if balance == "weights":
        of_classes = 1 / counts
    elif balance == "effective_number":  # Cui et al. (2019)
        of_classes = (1 - optim.effective_beta) / (1 - optim.effective_beta**counts)
    elif balance == "logit_adjust":  # Menon et al. (2021), with tau = 1
        offsets = np.log(counts / counts.sum())
    if of_classes is not None:  # so that an image has weight 1 on average, and learning rates keep their meaning
        of_classes = of_classes * counts.sum() / (of_classes * counts).sum()

    def tensor(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32, device=device)

    gamma = optim.focal_gamma if optim.loss == "focal" and optim.focal_gamma > 0 else None
    of_images = None if weights is None else torch.from_numpy(weights / weights.mean(dtype=np.float64)).float()
    return Loss(optim.label_smoothing, gamma, tensor(of_classes), tensor(offsets), of_images)
