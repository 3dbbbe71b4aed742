"""Networks whose trained part uses several values of the frozen part, or whose code calculates with sizes, are cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distil_tl.models.graph.frozen_prefix import CannotCutError, cut_frozen_prefix


class Heads(nn.Module):
    """Trained: it takes a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, tensors: list[Tensor]) -> Tensor:
        result: Tensor = self.one(tensors[0]) + self.two(tensors[1].mean((2, 3)))
        return result


class Several(nn.Module):
    """Two frozen branches and two trained layers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding=1)
        self.requires_grad_(False)
        self.heads, self.shift, self.drop = Heads(), nn.Parameter(torch.full((4,), 0.5)), nn.Dropout(0.5)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.left(images).mean((2, 3)), self.right(images)
        if self.how == "in turns":  # a frozen layer is called after a trained one
            left = self.heads.one(self.left(images).mean((2, 3)))
            result: Tensor = left + self.heads.two(self.right(images).mean((2, 3)))
            return result
        if self.how == "other order":
            right = right + self.drop(left)[:, :, None, None]
        elif self.how == "parts of images":
            number, channels, height, width = right.shape
            right = (right.view(number, channels, -1).mT.reshape(-1, channels) + self.shift).relu()
            right = right.view(number, height, width, channels).permute(0, 3, 1, 2)
            left = left * self.shift
        elif self.how == "rows of several images":
            rows = right.permute(2, 0, 3, 1).reshape(-1, 4)
            right = (rows * self.shift).view(right.shape[2], images.shape[0], -1, 4).permute(1, 3, 0, 2)
            left = left * self.shift
        elif self.how == "loop":
            right = torch.stack([self.shift[at] * row for at, row in enumerate(right.unbind(1))], 1)
            for _ in range(int(right.shape[-1] ** 0.5)):
                left = left * self.shift
        elif self.how == "number of images":
            left = left * self.shift + self.shift.expand(images.shape[0], -1)
        elif self.how == "more than four images" and images.shape[0] > 4:
            left = left + 1
        return self.heads([left, right])  # type: ignore[no-any-return]


CUT = ("two", "in turns", "other order", "parts of images", "loop", "number of images")
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def step(network: nn.Module, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> list[Tensor]:
    """Logits and gradients."""
    network.zero_grad()
    torch.manual_seed(0)  # of dropout
    logits = forward(inputs)
    F.cross_entropy(logits, torch.tensor([0, 1, 1, 0, 1])).backward()  # type: ignore[no-untyped-call]
    return [logits, *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("how", CUT)
def test_the_parts_compute_the_same_as_the_whole(how: str) -> None:
    network = Several(how)
    cut = cut_frozen_prefix(network, IMAGES[:3])
    features = cut.prefix(IMAGES)
    assert cut.packed
    assert len(features) == 5
    assert torch.equal(cut.prefix(IMAGES.flip(0)), features.flip(0)), "each row is of one image"
    assert not any(parameter.requires_grad for parameter in cut.prefix.parameters())
    for training in (True, False):
        network.train(training)
        cut.suffix.train(training)
        found = [step(network, network, IMAGES), step(network, cut.suffix, features.clone())]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    frozen = {network.left, network.right}
    assert not frozen.intersection(cut.suffix.modules()), "all that is frozen is in the first part"


@pytest.mark.parametrize("how", ["more than four images", "rows of several images"])
def test_code_in_which_an_image_does_not_stand_for_itself_is_not_cut(how: str) -> None:
    with pytest.raises(CannotCutError):
        cut_frozen_prefix(Several(how), IMAGES[:3])
