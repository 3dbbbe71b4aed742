"""Heads that are no linear layer: a network with one hidden layer, and a cosine classifier.

The structure of a network must be known before a checkpoint is loaded, so it is built with the kind of head that its
first stage fits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.models.head import HEAD_STD, init_head, seeded
from distil_tl.models.names import LINEAR
from distil_tl.utils.errors import UserError

HIDDEN = 256  # width of the hidden layer of an MLP head


class FittedHead(nn.Module):
    """A head that graphs of networks contain as one layer: features [N, D] to logits [N, C]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


class MlpHead(FittedHead):
    """A network with one hidden layer. What standardises its inputs is part of the first layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.hidden = nn.Linear(in_features, HIDDEN)
        self.output = nn.Linear(HIDDEN, out_features)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.output(F.relu(self.hidden(features)))
        return logits


class CosineHead(FittedHead):
    """Standardised features of length 1, times a weight for each class.

    As it is fitted, a weight is the direction of a class, multiplied by the factor of the logits. Later steps may
    change its length. The standardisation comes before a normalisation, so it can't be part of the weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(HEAD_STD * torch.randn(out_features, in_features))
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize((features - self.mean) / self.deviation, dim=-1), self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def new_head(name: str, module: nn.Module, paths: tuple[str, ...], kind: str, seed: int) -> None:
    """Give a network random weights of its head, or another kind of head in its place.

    The values depend on `seed`, `kind` and the path only.

    Args:
        name: of the network.
        paths: of its classifier layers.
        kind: `linear`, or one of `BUILT_HEADS`.

    Raises:
        UserError: the head is not one linear layer, which could be replaced.
    """
    if kind == LINEAR:
        init_head(module, paths, seed)
        return
    layer = module.get_submodule(paths[0])
    if len(paths) != 1 or not isinstance(layer, nn.Linear):
        what = f"{len(paths)} layers" if len(paths) != 1 else f"a {type(layer).__name__}"
        raise UserError(
            f"head={kind}: the head of {name} is {what}, not one linear layer, so it can't be replaced; use head=linear"
        )
    with seeded(seed, "model", "head", paths[0]):
        head = (MlpHead if kind == "mlp" else CosineHead)(layer.in_features, layer.out_features)
    if (hand_over := getattr(layer, "hand_over", None)) is not None:  # of a network that calls its head at the end
        hand_over(head)
    module.set_submodule(paths[0], head)
