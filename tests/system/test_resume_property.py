"""Samples and seeds of a job that is stopped or killed anywhere and resumed on any number of ranks.

No processes: ranks do not talk to each other about samples, so they can run one after the other. What is real are the
loop over an epoch, the sampler, the loader and its seeds, the learning rates, and how a run knows where it is.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distil_tl import run as run_module
from distil_tl.config import Config
from distil_tl.data import loader as loading
from distil_tl.data.config import fitting_world_sizes
from distil_tl.data.loader import Batch, ImageDataset, make_loader
from distil_tl.data.mixed_batches import MixedBatches, MixedDataset
from distil_tl.data.sampler import EvalBatches, EvalSampler, TrainSampler, in_batches
from distil_tl.data.stage_batches import StageBatches
from distil_tl.data.transforms import ImageTransform
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.preemption import AllRanksStopError, Request
from distil_tl.distributed.process_group import DistInfo
from distil_tl.run import Run
from distil_tl.rundir.state import Position, RunState, StageRecord
from distil_tl.train import train_one_epoch
from distil_tl.training.config import StageConfig
from distil_tl.training.losses import Loss
from distil_tl.training.metrics import Meter
from distil_tl.training.optim import current_lr
from distil_tl.training.stage import Stage
from distil_tl.training.step import StageTraining

NAMES = ("head", "middle", "full")


@dataclass(frozen=True)
class Attempt:
    """A number of ranks, and the end after `steps` steps: a signal (saves) or a kill (loses the steps since a save)."""

    world: int
    micro: int | None
    steps: int
    signal: bool


@dataclass(frozen=True)
class Plan:
    images: int
    batch: int
    epochs: tuple[int, ...]
    seed: int
    every: int | None
    attempts: tuple[Attempt, ...]
    balanced: bool = False
    mixed: bool = False  # by mixup and CutMix, but for the last epoch of each stage

    @property
    def undisturbed(self) -> Plan:
        return replace(self, every=None, attempts=(Attempt(1, None, 10**9, False),))


@dataclass
class Seen:
    """By (stage, epoch, step of the epoch): the samples over all ranks, and the rate.

    A sample is an image and its augmentation seed; where images are mixed, also those of its partner, share and box.
    """

    samples: dict[tuple[str, int, int], set[tuple[Any, ...]]] = field(default_factory=dict)
    rates: dict[tuple[str, int, int], float] = field(default_factory=dict)


class KilledError(Exception):
    pass


class Clock:
    """A stand-in for Agreement: signals the end of the attempt."""

    def __init__(self, attempt: Attempt) -> None:
        self.left, self.signal = attempt.steps, attempt.signal

    def exchange(self) -> Request:
        self.left -= 1
        if self.left > 0:
            return Request.CONTINUE
        if self.signal:
            return Request.STOP
        raise KilledError


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)

    def forward(self, seeds: Tensor) -> Tensor:
        logits: Tensor = self.fc((seeds.flatten(1) % 97).float() / 97)
        return logits


class Simulated(Run):
    saved: str | None = None

    def save(self, training: StageTraining, *, is_best: bool = False) -> None:
        self.saved, self.unsaved = json.dumps(self.state.to_json()), False


class Source:
    """A stand-in for ImageSource: records the samples."""

    def __init__(self, index: Any, plan: Plan, seen: Seen) -> None:
        self.images, self.plan, self.seen = index, plan, seen
        self.run: Any = None

    def index(self, split: str) -> Any:
        return self.images

    def batches(self, loader: Any, split: str) -> Iterator[Batch]:
        return note(loader, self.run, self.seen) if split == "train" else iter(())


def one_rank(plan: Plan, attempt: Attempt, rank: int, saved: str | None, seen: Seen) -> tuple[str | None, bool]:
    """The state that this rank saved, and whether it completed the job; its samples go to `seen`."""
    config = Config()
    config.data.global_batch_size = plan.batch
    config.data.max_local_batch_size = attempt.micro
    mixing: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0} if plan.mixed else {}
    config.stages = {
        name: StageConfig(epochs=n, mix_off_epochs=n // 2, **mixing)
        for name, n in zip(NAMES, plan.epochs, strict=False)
    }
    config.checkpoint.every_steps = plan.every
    config.seed = plan.seed
    info = DistInfo(Launch(rank=rank, world_size=attempt.world), torch.device("cpu"), 1.0)
    index: Any = SimpleNamespace(
        targets=[i % 2 for i in range(plan.images)], local_path=lambda i: i, copy=None, classes=("a", "b")
    )
    nothing: Any = SimpleNamespace(wait=lambda: None, path=Path(), preprocess=SimpleNamespace(crop_size=8))
    source: Any = Source(index, plan, seen)
    run = Simulated(
        info=info, config=config, source=source, model=nothing,
        state=RunState() if saved is None else RunState.from_json(json.loads(saved)),
        directory=nothing, checkpoints=nothing, tracker=None, stop=nothing, train_state=None,
    )  # fmt: skip
    run.saved, source.run = saved, run
    run.agreement = clock = Clock(attempt)  # type: ignore[assignment]
    try:
        for name in config.stages:
            if not run.has_finished(name):
                run_stage(run, plan, clock, run.stage(name))
    except KilledError:
        return run.saved, False
    except AllRanksStopError:
        assert not run.unsaved
        return run.saved, False
    return run.saved, True


def run_stage(run: Run, plan: Plan, clock: Clock, stage: Stage) -> None:
    """As in distil_tl.train, but for the network, evaluations and records."""
    info, data, index = run.info, run.config.data, run.source.index("train")
    sampler = TrainSampler(
        len(index.targets), global_batch_size=data.global_batch_size, world_size=info.world_size,
        rank=info.rank, seed=stage.seed, stage=stage.name, epochs=stage.config.epochs,
        targets=np.array(index.targets) if plan.balanced else None,
    )  # fmt: skip
    kind = ImageDataset if stage.mixing is None else MixedDataset
    dataset = kind(index, ImageTransform([InitialSeed()], 8), 8, seed=stage.seed, stage=stage.name)
    batches: Any = in_batches(sampler, run.plan.micro)
    if isinstance(dataset, MixedDataset):
        assert stage.mixing is not None
        dataset.mixing = stage.mixing
        batches = MixedBatches(sampler, run.plan.micro, stage.mixing)
    loader = make_loader(dataset, batches, workers=0, ahead=0, pin_memory=False)
    val_sampler = EvalBatches(EvalSampler(0, world_size=1, rank=0), 1)
    network: Any = Tiny()
    group = {"params": list(network.parameters()), "peak_lr": stage.config.lr}
    training = StageTraining(
        stage=stage, loss=Loss(), inner=network, network=network, images=index,
        batches=StageBatches(run.source, sampler, loader, val_sampler, loader),
        accumulation=run.plan.accumulation, optimizer=torch.optim.SGD([group], lr=stage.config.lr, fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False), total_steps=stage.config.epochs * sampler.steps_per_epoch,
        trains_statistics=False, first_bad_step=torch.tensor(torch.inf), recent=collections.deque(maxlen=1),
        meter=Meter(info, 2),
    )  # fmt: skip
    run.state.stages.setdefault(stage.name, StageRecord())
    position = run.enter(training)
    while position.epoch < stage.config.epochs:
        train_one_epoch(run, training, position)
        run.records.add_evaluation(training.moment(position), training.meter.total(), 0.0, 0.0)
        position = run.state.position = Position(stage.name, position.epoch + 1, 0, position.step)
        training.meter = Meter(info, 2)
        run.save(training)
        if clock.left == 0:  # the signal came with the last step of the epoch
            raise AllRanksStopError


class InitialSeed(nn.Module):
    """A stand-in for an augmentation: returns the seed that it would use."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.tensor([[[torch.initial_seed()]]])


def note(loader: Any, run: Run, seen: Seen) -> Iterator[Batch]:
    training = run.training
    assert training is not None
    for batch in loader:
        position = run.state.position  # of the step that asks for this batch
        assert position is not None
        key = (training.stage.name, position.epoch, position.consumed // training.sampler.global_batch_size)
        columns, seeds = [batch.indices, batch.images.flatten()[: len(batch.indices)]], batch.images.flatten()
        if batch.partners is not None:
            found = batch.partners
            columns += [found.indices, seeds[found.rows], found.shares, *found.boxes.unbind(1)]
        seen.samples.setdefault(key, set()).update(zip(*(column.tolist() for column in columns), strict=True))
        rate = current_lr(training.optimizer)
        assert seen.rates.setdefault(key, rate) == rate
        yield batch


def carry_out(plan: Plan) -> tuple[Seen, dict[str, Any]]:
    """The samples of all attempts, and the final state of the run."""
    seen, saved = Seen(), None
    for attempt in plan.attempts:
        now = Seen()
        ends = [one_rank(plan, attempt, rank, saved, now) for rank in range(attempt.world)]
        assert len({done for _, done in ends}) == 1
        assert all(position(text) == position(ends[0][0]) for text, _ in ends)
        for key, pairs in now.samples.items():
            assert len(pairs) == plan.batch, "one sample for each position of the batch, over all ranks"
            assert seen.samples.setdefault(key, pairs) == pairs, "a repeated step has the same samples"
            assert seen.rates.setdefault(key, now.rates[key]) == now.rates[key]
        saved, done = ends[0]
        if done:
            break
    assert saved is not None
    return seen, json.loads(saved)


def position(saved: str | None) -> Any:
    return None if saved is None else json.loads(saved)["position"]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    batch = draw(st.integers(1, 12))
    images = draw(st.integers(batch, 4 * batch + 3))
    epochs = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any)))
    total = images // batch * sum(epochs)

    def attempt(steps: int) -> Attempt:
        micro = draw(st.none() | st.integers(1, batch))
        return Attempt(draw(st.sampled_from(fitting_world_sizes(batch))), micro, steps, draw(st.booleans()))

    interrupted = [attempt(draw(st.integers(1, total))) for _ in range(draw(st.integers(1, 4)))]
    every = draw(st.none() | st.integers(1, 3))
    seed, balanced, mixed = draw(st.integers(0, 2**40)), draw(st.booleans()), draw(st.booleans())
    return Plan(images, batch, epochs, seed, every, (*interrupted, attempt(total + 1)), balanced, mixed)


@pytest.fixture(autouse=True, scope="module")
def _no_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "decode", lambda path, **_: torch.zeros(1))
        patch.setattr(run_module, "write_samples", lambda *_, **__: None)
        yield


@settings(max_examples=60, deadline=None)
@given(plans())
def test_an_interrupted_job_trains_on_the_same_samples(plan: Plan) -> None:
    expected, end = carry_out(plan.undisturbed)
    steps = plan.images // plan.batch
    stages = [(name, epochs) for name, epochs in zip(NAMES, plan.epochs, strict=False) if epochs]
    assert list(expected.samples) == [(n, e, s) for n, epochs in stages for e in range(epochs) for s in range(steps)]

    seen, after = carry_out(plan)
    assert seen.samples == expected.samples
    assert seen.rates == expected.rates
    assert after["position"] == end["position"]
    assert after["position"]["step"] == len(expected.samples)
    assert list(after["stages"]) == [name for name, _ in stages]


@settings(max_examples=20, deadline=None)
@given(plans())
def test_no_two_samples_of_a_job_have_the_same_seed(plan: Plan) -> None:
    seeds = [seed for pairs in carry_out(plan.undisturbed)[0].samples.values() for _, seed, *_ in pairs]
    assert len(set(seeds)) == len(seeds)
