"""Parameter groups, the learning rate as a function of the step, and skipped steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.config import OPTIMIZERS, SCHEDULES, OptimConfig, StageConfig
from distil_tl.training.optim import (
    build_optimizer,
    clip_gradients,
    current_lr,
    lr_factor,
    parameter_groups,
    set_lr,
)
from distil_tl.training.stage import apply_stage
from tests.helpers.networks import images, tiny


def groups_of(stage: StageConfig, weight_decay: float = 0.1) -> tuple[TransferModel, list[dict[str, Any]]]:
    model = tiny()
    apply_stage(model, stage)
    return model, parameter_groups(model, stage, weight_decay)


@pytest.mark.parametrize("unfreeze", ["head", "all", 2, ["stem", "layer2"]])
def test_each_trainable_parameter_is_there_once_and_no_frozen_one(unfreeze: Any):
    model, groups = groups_of(StageConfig(unfreeze=unfreeze))
    listed = [parameter for group in groups for parameter in group["params"]]
    names = [name for group in groups for name in group["param_names"]]
    expected = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert len(listed) == len(names) == len(expected)
    assert set(names) == expected
    assert all(model.module.get_parameter(name) is parameter for name, parameter in zip(names, listed, strict=True))
    for group in groups:
        assert all(name.startswith(group["group"]) for name in group["param_names"])


def test_vectors_do_not_decay_and_matrices_do():
    model, groups = groups_of(StageConfig(unfreeze="all"), weight_decay=0.1)
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    for name, parameter in model.module.named_parameters():
        assert decays[name] == (0.1 if parameter.ndim > 1 else 0.0), name
    assert decays["layer1.norm.weight"] == decays["head.bias"] == 0.0


def test_tokens_and_position_embeddings_do_not_decay():
    for name, tokens in (("vit_b_32", {"class_token", "pos_embedding"}), ("timm/test_vit", {"cls_token", "pos_embed"})):
        model = build(ModelConfig(name, "none"), 3, image_size=160, seed=0)
        stage = StageConfig(unfreeze="all")
        decays = {n: g["weight_decay"] for g in parameter_groups(model, stage, 0.1) for n in g["param_names"]}
        spared = {n.rpartition(".")[2] for n in decays if decays[n] == 0 and model.module.get_parameter(n).ndim > 1}
        assert spared == tokens


def test_layer_decay_goes_by_depth_below_the_head():
    _, groups = groups_of(StageConfig(unfreeze="all", lr=0.8, layer_decay=0.5))
    peaks = {group["group"]: group["peak_lr"] for group in groups}
    assert peaks == {"head": 0.8, "layer2": 0.4, "layer1": 0.2, "stem": 0.1}
    assert [group["group"] for group in groups][:2] == ["head", "head"]


def test_layer_decay_counts_the_frozen_groups_too():
    _, groups = groups_of(StageConfig(unfreeze=["layer1"], lr=0.8, layer_decay=0.5))
    assert {group["peak_lr"] for group in groups} == {0.2}


def test_set_lr_keeps_the_groups_in_proportion():
    stage = StageConfig(unfreeze="all", lr=0.8, layer_decay=0.5)
    model, _ = groups_of(stage)
    optimizer = build_optimizer(model, stage, OptimConfig())
    set_lr(optimizer, 0.25)
    assert {group["group"]: group["lr"] for group in optimizer.param_groups} == {
        "head": 0.2,
        "layer2": 0.1,
        "layer1": 0.05,
        "stem": 0.025,
    }
    assert current_lr(optimizer) == 0.2
    set_lr(optimizer, 1.0)
    assert current_lr(optimizer) == 0.8


def test_the_optimizer_is_as_configured():
    stage = StageConfig(unfreeze="head")
    model, _ = groups_of(stage)
    sgd = build_optimizer(model, stage, OptimConfig(name="sgd", momentum=0.5, weight_decay=0.3))
    assert isinstance(sgd, torch.optim.SGD)
    assert {(group["momentum"], group["nesterov"]) for group in sgd.param_groups} == {(0.5, True)}
    assert {group["weight_decay"] for group in sgd.param_groups} == {0.3, 0.0}
    plain = build_optimizer(model, stage, OptimConfig(name="sgd", momentum=0.0))
    assert not plain.param_groups[0]["nesterov"]
    assert isinstance(build_optimizer(model, stage, OptimConfig()), torch.optim.AdamW)


# The learning rate


@given(st.integers(1, 400), st.floats(0, 0.99), st.sampled_from(SCHEDULES))
def test_the_learning_rate_rises_to_its_peak_once_and_never_reaches_zero(total: int, warmup: float, schedule: str):
    factors = [lr_factor(step, total, warmup, schedule) for step in range(total)]
    warm = round(warmup * total)
    assume(warm < total)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[warm] == 1
    assert all(a < b for a, b in pairwise(factors[: warm + 1]))
    after = factors[warm:]
    if schedule == "constant":
        assert set(after) == {1.0}
    else:
        assert factors.count(1) == 1
        assert all(a > b for a, b in pairwise(after))


def test_the_learning_rate_by_numbers():
    assert [lr_factor(step, 8, 0.25, "linear") for step in (0, 1, 2, 5, 7)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1 / 2, 1 / 6]
    )
    assert [lr_factor(step, 4, 0.0, "cosine") for step in range(4)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )


# Steps


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*module.parameters(), *moments)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def take_step(model: TransferModel, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
    (model.module(images()).sum() * factor).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_found_inf_changes_nothing(name: str):
    stage = StageConfig(unfreeze=2, lr=0.1)
    model, _ = groups_of(stage)
    optimizer = build_optimizer(model, stage, OptimConfig(name=name))
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    take_step(model, optimizer)
    before = snapshot(model.module, optimizer)
    take_step(model, optimizer)
    assert not same(before, snapshot(model.module, optimizer))

    before = snapshot(model.module, optimizer)
    assert len(before) > len(list(model.module.parameters()))  # moments are among them
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    take_step(model, optimizer, float("nan"))
    take_step(model, optimizer)
    assert same(before, snapshot(model.module, optimizer))

    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    take_step(model, optimizer)
    assert not same(before, snapshot(model.module, optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_with_found_inf_leaves_the_weights(name: str):
    stage = StageConfig(unfreeze="all", lr=0.1)
    model, _ = groups_of(stage)
    optimizer = build_optimizer(model, stage, OptimConfig(name=name))
    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    take_step(model, optimizer, float("inf"))
    assert same(before, [parameter.detach() for parameter in model.module.parameters()])


def gradients(model: TransferModel) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.module.parameters() if p.grad is not None])


@pytest.mark.parametrize(("limit", "clipped"), [(0.5, True), (1e9, False), (None, False)])
def test_clipping(limit: float | None, clipped: bool):
    stage = StageConfig(unfreeze="all")
    model, _ = groups_of(stage)
    optimizer = build_optimizer(model, stage, OptimConfig())
    model.module(images()).sum().backward()
    raw = gradients(model)
    norm = clip_gradients(optimizer, limit)
    assert isinstance(norm, Tensor)
    assert float(norm) == pytest.approx(float(raw.norm()), rel=1e-5)
    if clipped:
        assert limit is not None
        assert float(norm) > limit
        torch.testing.assert_close(gradients(model), raw * limit / raw.norm())
    else:
        assert torch.equal(gradients(model), raw)


def test_the_norm_shows_when_a_gradient_is_not_finite():
    stage = StageConfig(unfreeze="head")
    model, _ = groups_of(stage)
    optimizer = build_optimizer(model, stage, OptimConfig())
    (model.module(images()).sum() * float("nan")).backward()
    assert not clip_gradients(optimizer, 1.0).isfinite()
    assert not clip_gradients(optimizer, None).isfinite()


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (OptimConfig(name="adam"), "name"),
        (OptimConfig(schedule="steps"), "schedule"),
        (OptimConfig(weight_decay=-1), "weight_decay"),
        (OptimConfig(momentum=1), "momentum"),
        (OptimConfig(warmup=1), "warmup"),
        (OptimConfig(label_smoothing=1), "label_smoothing"),
        (OptimConfig(clip_norm=0), "clip_norm"),
    ],
    ids=str,
)
def test_problems_name_the_key(config: OptimConfig, key: str):
    (problem,) = config.problems()
    assert problem.startswith(f"optim.{key} ")


def test_the_defaults_are_no_problem():
    assert OptimConfig().problems() == OptimConfig(clip_norm=None, warmup=0, momentum=0).problems() == []


def test_a_skipped_first_step_leaves_sgd_valid():
    model = tiny()
    stage = StageConfig(unfreeze="all")
    apply_stage(model, stage)
    optimizer = build_optimizer(model, stage, OptimConfig(name="sgd"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]  # as GradScaler does when fp16 overflows
    optimizer.step()
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.allclose(p, old, atol=1e-3) for p, old in zip(parameters, before, strict=True))
