"""Freezing, on a small model and on a real one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.config import SearchConfig, StageConfig, default_stages, wants_features
from distil_tl.training.stage import apply_stage, check_stages, count_trainable, trainable_groups
from distil_tl.utils.errors import UserError
from tests.helpers.networks import NAMES, images, tiny


def buffers(model: TransferModel) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.module.named_buffers()}


def moved(before: dict[str, Tensor], model: TransferModel) -> set[str]:
    """Names of the groups whose buffers changed in any byte."""
    changed = {name for name, buffer in model.module.named_buffers() if not torch.equal(buffer, before[name])}
    return {model.groups[group].name for name in changed if (group := model.group_of(name)) is not None}


def trainable(model: TransferModel) -> set[str]:
    names = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    return {model.groups[model.parameter_groups[name]].name for name in names}


def modes(model: TransferModel) -> dict[str, bool]:
    return {name: module.training for name, module in model.module.named_modules()}


# Which groups a stage trains


@pytest.mark.parametrize(
    ("unfreeze", "groups"),
    [
        ("head", {3}),
        ("all", {0, 1, 2, 3}),
        (1, {3}),
        (3, {1, 2, 3}),
        (4, {0, 1, 2, 3}),
        (["head"], {3}),
        (["head", "stem"], {0, 3}),
        (("layer2",), {2}),
    ],
)
def test_trainable_groups(unfreeze: Any, groups: set[int]):
    assert trainable_groups(unfreeze, NAMES) == groups


def test_unknown_groups_come_with_a_suggestion_and_the_list():
    with pytest.raises(UserError) as caught:
        trainable_groups(["layer22", "head", "neck"], NAMES, key="stages.top.unfreeze")
    message = str(caught.value)
    assert message.startswith("stages.top.unfreeze names layer22, neck, did you mean `layer2`")
    assert "the model's groups are stem, layer1, layer2, head" in message


def test_more_groups_than_there_are():
    with pytest.raises(UserError, match="unfreeze=5, but the model has 4 groups: stem, layer1, layer2, head"):
        trainable_groups(5, NAMES)


# Applying a stage

STAGES = [
    StageConfig(unfreeze="head"),
    StageConfig(unfreeze="all"),
    StageConfig(unfreeze="all", batch_norm="train"),
    StageConfig(unfreeze=2, batch_norm="train"),
    StageConfig(unfreeze=["stem", "head"]),
]


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_a_stage_does_not_depend_on_the_stage_before(stage: StageConfig):
    fresh = tiny()
    apply_stage(fresh, stage)
    for before in STAGES:
        model = tiny()
        apply_stage(model, before)
        model.module.eval()
        for _ in range(2):  # idempotent
            apply_stage(model, stage)
            assert trainable(model) == trainable(fresh)
            assert modes(model) == modes(fresh)
        model.module.train()
        assert modes(model) == modes(fresh)
        model.module.eval()
        assert not any(modes(model).values())


def test_only_the_stages_groups_train():
    model = tiny()
    apply_stage(model, StageConfig(unfreeze=["layer1", "head"]))
    assert trainable(model) == {"layer1", "head"}
    assert count_trainable(model.module) == (4 * 4 * 9 + 4) + 2 * 4 + (6 * 3 + 3)
    model.module(images()).sum().backward()
    assert model.module.get_parameter("stem.conv.weight").grad is None
    assert model.module.get_parameter("layer1.conv.weight").grad is not None


def test_gradients_of_the_stage_before_are_gone():
    model = tiny()
    model.module(images()).sum().backward()
    apply_stage(model, StageConfig(unfreeze="head"))
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_frozen_modules_stay_in_evaluation_mode():
    model = tiny()
    apply_stage(model, StageConfig(unfreeze=2, batch_norm="train"))
    model.module.train()
    for module in model.module.modules():
        module.train()
    assert {name for name, mode in modes(model).items() if "norm" in name and mode} == {"layer2.norm"}
    assert {name for name, mode in modes(model).items() if "drop" in name and mode} == {"layer2.drop", "drop"}


def test_frozen_batch_norm_stays_in_evaluation_mode_where_its_group_trains():
    model = tiny()
    apply_stage(model, StageConfig(unfreeze="all"))
    model.module.train()
    assert not any(mode for name, mode in modes(model).items() if "norm" in name)
    assert all(mode for name, mode in modes(model).items() if "norm" not in name)
    assert model.module.get_parameter("layer1.norm.weight").requires_grad


@pytest.mark.parametrize(
    "stage", [StageConfig(unfreeze="head", batch_norm="train"), StageConfig(unfreeze="all")], ids=str
)
def test_buffers_of_what_is_frozen_stay_byte_equal(stage: StageConfig):
    model = tiny()
    apply_stage(model, stage)
    model.module.train()
    before = buffers(model)
    for _ in range(3):
        model.module(images()).sum().backward()
    assert moved(before, model) == set()


def test_statistics_move_in_the_groups_that_train_and_nowhere_else():
    model = tiny()
    apply_stage(model, StageConfig(unfreeze=["layer1", "head"], batch_norm="train"))
    model.module.train()
    before = buffers(model)
    model.module(images())
    assert moved(before, model) == {"layer1"}


def test_what_is_frozen_is_a_fixed_function_of_its_input():
    model = tiny()
    apply_stage(model, StageConfig(unfreeze="head"))
    model.module.train()
    features = model.module[:5]  # type: ignore[index]
    assert torch.equal(features(images()), features(images()))
    assert not torch.equal(model.module(images()), model.module(images()))  # the head's dropout is on
    apply_stage(model, StageConfig(unfreeze="all"))
    assert not torch.equal(features(images()), features(images()))


def test_a_real_network():
    model = build(ModelConfig("resnet18", "none"), 3, image_size=32, seed=0)
    apply_stage(model, StageConfig(unfreeze=2, batch_norm="train"))
    assert trainable(model) == {"layer4", "head"}
    model.module.train()
    before = buffers(model)
    model.module(images(2, 32)).sum().backward()
    assert moved(before, model) == {"layer4"}
    for name, parameter in model.module.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("layer4", "fc")), name


# Checking


def test_problems_that_only_the_built_model_shows():
    model = tiny()
    check_stages(model, {"a": StageConfig(unfreeze=4, image_size=12), "b": StageConfig(unfreeze=["layer1"])})
    with pytest.raises(UserError, match=r"stages\.b\.unfreeze names layer9, did you mean"):
        check_stages(model, {"a": StageConfig(), "b": StageConfig(unfreeze=["layer9"])})
    with pytest.raises(UserError, match=r"stages\.b\.unfreeze=5, but the model has 4 groups"):
        check_stages(model, {"a": StageConfig(), "b": StageConfig(unfreeze=5)})


def test_a_fixed_image_size():
    model = dataclasses.replace(tiny(), fixed_image_size=True)
    check_stages(model, {"a": StageConfig(), "b": StageConfig(image_size=10)})
    with pytest.raises(UserError, match=r"stages\.b\.image_size=12, but this model is built for 10 px"):
        check_stages(model, {"a": StageConfig(), "b": StageConfig(image_size=12)})


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        (StageConfig(unfreeze=0), "unfreeze"),
        (StageConfig(unfreeze=True), "unfreeze"),
        (StageConfig(unfreeze=1.5), "unfreeze"),
        (StageConfig(unfreeze="tail"), "unfreeze"),
        (StageConfig(unfreeze=[]), "unfreeze"),
        (StageConfig(unfreeze=[1]), "unfreeze"),
        (StageConfig(unfreeze=None), "unfreeze"),
        (StageConfig(epochs=-1), "epochs"),
        (StageConfig(lr=0.0), "lr"),
        (StageConfig(lr=float("inf")), "lr"),
        (StageConfig(lr=float("nan")), "lr"),
        (StageConfig(layer_decay=0.0), "layer_decay"),
        (StageConfig(layer_decay=1.1), "layer_decay"),
        (StageConfig(batch_norm="eval"), "batch_norm"),
        (StageConfig(augment="wild"), "augment"),
        (StageConfig(image_size=7), "image_size"),
        (StageConfig(mixup=-0.1), "mixup"),
        (StageConfig(cutmix=float("nan")), "cutmix"),
        (StageConfig(mix_off_epochs=-1), "mix_off_epochs"),
    ],
    ids=str,
)
def test_problems_name_the_key(stage: StageConfig, key: str):
    (problem,) = stage.problems("top")
    assert problem.startswith(f"stages.top.{key} ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "on"}, "features can't be mixed; remove its mixup and cutmix, or stages.a.features"),
        ({"views": 2}, "or stages.a.views"),
        ({"search": SearchConfig(lr=[1e-3])}, "or stages.a.search"),
        ({"mix_off_epochs": 3}, "stages.a.mix_off_epochs=3 leaves none of 3 epochs to mix images in"),
    ],
)
def test_mixing_where_it_is_not_possible_is_refused(settings: dict[str, Any], message: str):
    (problem,) = StageConfig(unfreeze="head", epochs=3, cutmix=1.0, **settings).problems("a")
    assert message in problem


def test_a_stage_that_mixes_does_not_use_features_by_itself():
    head = StageConfig(unfreeze="head")
    assert wants_features(head, "none")
    assert not wants_features(dataclasses.replace(head, mixup=0.2), "none")


def test_valid_values_have_no_problems():
    assert [problem for name, stage in default_stages().items() for problem in stage.problems(name)] == []
    for unfreeze in ("head", "all", 1, ["stem"]):
        assert StageConfig(unfreeze=unfreeze, epochs=0, augment="none", image_size=8).problems("top") == []


def test_all_problems_of_a_stage_are_listed():
    wrong = StageConfig(unfreeze=0, epochs=-1, lr=0, layer_decay=0, batch_norm="", augment="", image_size=0)
    assert len(wrong.problems("x")) == 7
