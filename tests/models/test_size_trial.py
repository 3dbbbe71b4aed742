"""One trial image decides whether a model takes images of a size; a refusal names sizes that it takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from distil_tl.models.config import ModelConfig
from distil_tl.models.size_trial import failure_at
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import check_stages
from distil_tl.utils.errors import UserError
from tests.helpers.networks import tiny


class Picky(nn.Module):
    """A network for images of at least 12 px."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.network, self.error = tiny().module, error

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] < 12:
            raise self.error
        logits: Tensor = self.network(images)
        return logits


def picky(error: Exception) -> TransferModel:
    model = dataclasses.replace(tiny(), name="timm/none-such", image_size=12)
    model.module = Picky(error)
    return model


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [
        ("timm/efficientformer_l1", 64, "use 224"),
        ("timm/halonet26t", 64, "use 256"),
        ("timm/crossvit_tiny_240", 64, "use 240"),
        ("timm/levit_128s", 97, "use 64, 96, 128, 160 or 224"),
        ("timm/nest_tiny", 40, "use 32, 64, 96 or 224"),  # it can't even be built for 40
    ],
)
def test_sizes_that_work_are_named(name: str, size: int, sizes: str) -> None:
    with pytest.raises(UserError) as caught, torch.device("meta"):
        build(ModelConfig(name, "none"), 3, image_size=size, seed=0).try_size(size, "data.image_size")
    message = str(caught.value)
    assert message.startswith(f"data.image_size={size} does not fit {name}: its code fails at this size (")
    assert message.endswith(sizes)


def test_each_stage_is_tried_at_its_size() -> None:
    model = picky(AssertionError("at least 12\nthat is so"))
    stages = {"head": StageConfig(), "later": StageConfig(image_size=14), "none": StageConfig(image_size=8, epochs=0)}
    check_stages(model, stages)
    stages["full"] = StageConfig(image_size=10)
    with pytest.raises(UserError, match=r"^timm/none-such fails with images of 10 px \(AssertionError: at least 12\)"):
        check_stages(model, stages)


def test_the_trial_changes_nothing() -> None:
    module = Picky(RuntimeError()).train()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.random.get_rng_state()
    assert failure_at(module, 16) is None
    assert failure_at(module, 8) == "RuntimeError"
    assert all(part.training for part in module.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_what_is_unknown_without_values_is_no_reason() -> None:
    for error in (NotImplementedError("no kernel"), RuntimeError("Tensor.item() cannot be called on meta tensors")):
        assert failure_at(Picky(error), 8) is not None
        assert failure_at(Picky(error).to("meta"), 8) is None
    assert failure_at(Picky(RuntimeError("shapes differ")).to("meta"), 8) == "RuntimeError: shapes differ"


def test_too_little_memory_is_not_taken_for_a_wrong_size() -> None:
    with pytest.raises(MemoryError):
        failure_at(Picky(MemoryError()), 8)
