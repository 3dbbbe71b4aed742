"""The order of samples, tested by looping over ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distil_tl.data.config import fitting_world_sizes
from distil_tl.data.loader import plan_batches
from distil_tl.data.sampler import EvalSampler, SampleKey, TrainSampler, epoch_order


def samplers(length: int, batch: int, world: int, *, seed: int = 0, stage: str = "head") -> list[TrainSampler]:
    return [
        TrainSampler(length, global_batch_size=batch, world_size=world, rank=rank, seed=seed, stage=stage)
        for rank in range(world)
    ]


def global_batches(ranks: list[TrainSampler], epoch: int, consumed: int = 0) -> list[list[SampleKey]]:
    """What the optimizer sees, step by step: the ranks' shares of each global batch, in order of position."""
    yielded = []
    for sampler in ranks:
        sampler.set_position(epoch, consumed)
        yielded.append(list(sampler))
        assert len(sampler) == len(yielded[-1])
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


@given(trainings())
def test_the_next_epoch_starts_at_its_first_sample(training: tuple[int, int, int, int]):
    length, batch, world, _ = training
    ranks = samplers(length, batch, world)
    global_batches(ranks, 0, consumed=length // batch * batch)
    assert len(global_batches(ranks, 1)) == length // batch


def test_no_samples_are_left_at_the_end_of_an_epoch():
    (sampler,) = samplers(10, 4, 1)
    sampler.set_position(0, sampler.end)
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
