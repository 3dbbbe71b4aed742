"""The order of samples, tested by looping over ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distil_tl.data.config import fitting_world_sizes
from distil_tl.data.loader import plan_batches
from distil_tl.data.sampler import (
    EvalBatches,
    EvalSampler,
    SampleKey,
    TrainSampler,
    balanced_order,
    epoch_order,
    in_batches,
    members_of_classes,
)


def samplers(
    length: int, batch: int, world: int, *, seed: int = 0, stage: str = "head", epochs: int = 1
) -> list[TrainSampler]:
    return [
        TrainSampler(
            length, global_batch_size=batch, world_size=world, rank=rank, seed=seed, stage=stage, epochs=epochs
        )
        for rank in range(world)
    ]


def global_batches(ranks: list[TrainSampler], epoch: int, consumed: int = 0) -> list[list[SampleKey]]:
    """What the optimizer sees in one epoch, step by step."""
    return steps_of(ranks, [list(sampler.keys(epoch, consumed)) for sampler in ranks])


def stage_batches(ranks: list[TrainSampler], epoch: int, consumed: int = 0) -> list[list[SampleKey]]:
    """What the optimizer sees from a position to the end of the stage, step by step."""
    yielded = []
    for sampler in ranks:
        sampler.set_position(epoch, consumed)
        yielded.append(list(sampler))
        assert len(sampler) == len(yielded[-1])
    return steps_of(ranks, yielded)


def steps_of(ranks: list[TrainSampler], yielded: list[list[SampleKey]]) -> list[list[SampleKey]]:
    """The ranks' shares of each global batch, in order of position."""
    share = ranks[0].global_batch_size // len(ranks)
    assert len({len(keys) for keys in yielded}) == 1
    assert len(yielded[0]) % share == 0
    steps = len(yielded[0]) // share
    return [
        sorted((key for keys in yielded for key in keys[step * share : (step + 1) * share]), key=lambda k: k.position)
        for step in range(steps)
    ]


@st.composite
def trainings(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Number of images, global batch size, and two world sizes that divide it."""
    batch = draw(st.integers(1, 24))
    length = draw(st.integers(batch, 200))
    worlds = st.sampled_from(fitting_world_sizes(batch))
    return length, batch, draw(worlds), draw(worlds)


@given(trainings(), st.integers(0, 2**40), st.integers(0, 5))
def test_global_batches_are_slices_of_the_order_for_any_world_size(
    training: tuple[int, int, int, int], seed: int, epoch: int
):
    length, batch, world, _ = training
    order = epoch_order(length, seed, "head", epoch)
    batches = global_batches(samplers(length, batch, world, seed=seed), epoch)
    assert len(batches) == length // batch
    for step, keys in enumerate(batches):
        positions = range(step * batch, (step + 1) * batch)
        assert keys == [SampleKey(int(order[position]), epoch, position) for position in positions]


@given(trainings(), st.integers(0, 3), st.data())
def test_a_killed_run_is_resumed_exactly_on_another_world_size(
    training: tuple[int, int, int, int], epoch: int, data: st.DataObject
):
    length, batch, before, after = training
    whole = global_batches(samplers(length, batch, before), epoch)
    killed = data.draw(st.integers(0, len(whole)), label="steps before the kill")
    rest = global_batches(samplers(length, batch, after), epoch, consumed=killed * batch)
    assert whole[:killed] + rest == whole


@given(trainings(), st.integers(1, 4), st.data())
def test_a_stage_continues_over_its_epochs_from_any_position(
    training: tuple[int, int, int, int], epochs: int, data: st.DataObject
):
    length, batch, world, _ = training
    ranks, steps = samplers(length, batch, world, epochs=epochs), length // batch
    epoch = data.draw(st.integers(0, epochs - 1), label="epoch")
    done = data.draw(st.integers(0, steps), label="steps done")
    expected = [step for e in range(epochs) for step in global_batches(ranks, e)]
    assert stage_batches(ranks, epoch, done * batch) == expected[epoch * steps + done :]


@given(trainings(), st.integers(1, 3), st.data())
def test_no_micro_batch_has_samples_of_two_epochs(
    training: tuple[int, int, int, int], epochs: int, data: st.DataObject
):
    length, batch, world, _ = training
    micro = plan_batches(batch, world, data.draw(st.none() | st.integers(1, batch))).micro
    for sampler in samplers(length, batch, world, epochs=epochs):
        batches = list(in_batches(sampler, micro))
        assert {len(keys) for keys in batches} == {micro}
        assert all(len({key.epoch for key in keys}) == 1 for keys in batches)


def test_no_samples_are_left_at_the_end_of_a_stage():
    (sampler,) = samplers(10, 4, 1, epochs=3)
    sampler.set_position(2, sampler.end)
    assert sampler.end == 8
    assert list(sampler) == []
    assert len(sampler) == 0


def test_a_position_inside_a_batch_is_refused():
    with pytest.raises(ValueError, match="not a whole number of global batches"):
        samplers(10, 4, 1)[0].set_position(0, 3)


@pytest.mark.parametrize(("length", "batch", "world"), [(10, 4, 3), (3, 4, 1)])
def test_a_batch_that_cannot_be_divided_is_refused(length: int, batch: int, world: int):
    with pytest.raises(ValueError, match=f"global batch {batch}"):
        samplers(length, batch, world)


@given(st.integers(0, 300), st.integers(0, 2**62), st.integers(0, 100))
def test_an_order_is_a_permutation(length: int, seed: int, epoch: int):
    order = epoch_order(length, seed, "head", epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))
    assert order.tolist() == epoch_order(length, seed, "head", epoch).tolist()


def test_the_order_differs_for_each_seed_stage_and_epoch():
    keys = [(0, "head", 0), (0, "head", 1), (0, "full", 0), (1, "head", 0), (1, "head", 1)]
    orders = [epoch_order(100, *key).tolist() for key in keys]
    assert len({tuple(order) for order in orders}) == len(keys)


def test_the_order_is_pinned():
    """A change would silently change the order of every resumed run: users must be told."""
    assert epoch_order(12, 0, "head", 0).tolist() == [8, 11, 6, 4, 5, 3, 9, 1, 10, 0, 2, 7]
    assert epoch_order(12, 7, "full", 3).tolist() == [7, 6, 4, 8, 5, 11, 0, 9, 1, 3, 2, 10]


@pytest.mark.parametrize("world", range(1, 10))
def test_evaluation_covers_every_sample_once(world: int):
    for length in range(51):
        ranks = [EvalSampler(length, world_size=world, rank=rank) for rank in range(world)]
        shares = [list(sampler) for sampler in ranks]
        assert sorted(key.image for share in shares for key in share) == list(range(length))
        assert all(key == SampleKey(key.image, 0, key.image) for share in shares for key in share)
        assert [len(sampler) for sampler in ranks] == [len(share) for share in shares]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 9), st.integers(1, 3))
def test_every_pass_of_an_evaluation_has_its_own_batches(length: int, world: int, size: int, passes: int):
    for rank in range(world):
        batches = EvalBatches(EvalSampler(length, world_size=world, rank=rank), size)
        once = list(batches)
        assert [key for keys in once for key in keys] == list(batches.sampler)
        assert all(1 <= len(keys) <= size for keys in once)
        assert len(once) == batches.per_pass <= batches.turns
        assert rank > 0 or len(once) == batches.turns
        batches.passes = passes
        assert list(batches) == once * passes
        assert len(batches) == len(once) * passes


@given(st.integers(1, 512), st.data())
def test_a_plan_divides_the_batch_into_the_largest_parts_that_fit(batch: int, data: st.DataObject):
    world = data.draw(st.sampled_from(fitting_world_sizes(batch)))
    limit = data.draw(st.none() | st.integers(1, 600))
    plan = plan_batches(batch, world, limit)
    assert plan.micro * plan.accumulation * world == batch
    share = batch // world
    if limit is None:
        assert plan.accumulation == 1
    else:
        assert plan.micro == max(n for n in range(1, min(limit, share) + 1) if share % n == 0)


def test_fitting_world_sizes_are_the_divisors():
    assert fitting_world_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert all(a < b for a, b in pairwise(fitting_world_sizes(360)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 9))
def test_a_balanced_epoch_has_each_class_equally_often(targets: list[int], epoch: int) -> None:
    order = balanced_order(members_of_classes(np.array(targets)), 7, "head", epoch)
    assert len(order) == len(targets)
    by_class: dict[int, list[int]] = {target: [] for target in targets}
    for image in order.tolist():
        by_class[targets[image]].append(image)
    numbers = [len(images) for images in by_class.values()]
    assert max(numbers) - min(numbers) <= 1
    for images in by_class.values():  # each image of a class as often as another, up to one
        repeats = (
            [images.count(image) for image in range(len(targets)) if targets[image] == targets[images[0]]]
            if images
            else [0]
        )
        assert max(repeats) - min(repeats) <= 1
    assert order.tolist() == balanced_order(members_of_classes(np.array(targets)), 7, "head", epoch).tolist()


def test_balanced_epochs_and_seeds_differ() -> None:
    targets = np.array([0] * 50 + [1] * 5)
    members = members_of_classes(targets)
    assert [images.tolist() for images in members] == [list(range(50)), list(range(50, 55))]
    orders = [balanced_order(members, seed, "head", epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(trainings())
def test_balanced_global_batches_do_not_depend_on_the_world_size(training: tuple[int, int, int, int]) -> None:
    length, batch, *worlds = training
    targets = np.arange(length) % 3 * (np.arange(length) % 2)
    one, other = (
        [
            TrainSampler(
                length,
                global_batch_size=batch,
                world_size=world,
                rank=rank,
                seed=3,
                stage="x",
                epochs=2,
                targets=targets,
            )
            for rank in range(world)
        ]
        for world in worlds
    )
    assert stage_batches(one, 0) == stage_batches(other, 0)
    assert stage_batches(one, 1, batch * 0) == stage_batches(other, 1)
