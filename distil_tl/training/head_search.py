"""A grid of learning rates and weight decays for a head: all heads train at once on features, and the best is taken.

A linear head is small, so that many of them cost little more than the reading of the features. Each trains as the stage
would train it alone: from the same weights, on the same batches, by the same schedule. Only the choice is kept. The
stage then trains with it as with any other settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.data.feature_cache import FeatureDataset
from distil_tl.data.loader import Batch
from distil_tl.data.sampler import SampleKey, TrainSampler
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.preemption import Agreement
from distil_tl.run import Job
from distil_tl.rundir.directory import StageRecord
from distil_tl.training.features import Features
from distil_tl.training.network import FeatureNetwork, Network
from distil_tl.training.optim import OptimConfig, lr_factor
from distil_tl.training.stage import SearchConfig, StageConfig
from distil_tl.training.stage_setup import Ready
from distil_tl.utils.errors import NonFiniteError, UserError
from distil_tl.utils.log import Progress, logger
from distil_tl.utils.rng import seed_draws

# How many weights train in one piece. On a CPU they fit its cache with their moments; a GPU wants few, large kernels.
TOGETHER = {"cpu": 200_000, "cuda": 1 << 26}
BLOCK = 2048  # images whose features are read at once
LEARNED = (
    1e-12  # A smaller slope is 0: far below what float32 tells from 0 here, and its square a number CPUs are slow at
)
BETAS, EPS = (0.9, 0.999), 1e-8  # as torch.optim.AdamW has them


class Settings(NamedTuple):
    """What tells one head from another."""

    lr: float
    weight_decay: float


class Step(NamedTuple):
    """A global batch for any number of heads.

    Attributes:
        features: float32 [B, K], after the dropout, with a last column of ones where the head has a bias.
        targets: float32 [B, C], smoothed.
        shares: float32 [B], of each image in the loss; 0 where it is left out.
        factor: of the learning rates.
    """

    features: Tensor
    targets: Tensor
    shares: Tensor
    factor: float


class Heads:
    """Copies of a linear head, each with settings of its own, trained by the closed form of their gradient.

    Attributes:
        weight: float32 [H, C, K]; the bias, if any, is the last column.
        finite: bool [H], whether all gradients were.
    """

    def __init__(self, head: nn.Linear, settings: Sequence[Settings], optim: OptimConfig, device: torch.device) -> None:
        weight = head.weight.detach()
        columns = weight if head.bias is None else torch.cat([weight, head.bias.detach()[:, None]], dim=1)
        self.weight = columns.to(device, torch.float32).repeat(len(settings), 1, 1)
        self.finite = torch.ones(len(settings), dtype=torch.bool, device=device)
        self.lr, self.weight_decay = (
            torch.tensor(column, device=device)[:, None, None] for column in zip(*settings, strict=True)
        )
        self._optim = optim
        self._decayed = self.weight[..., : head.in_features]  # not the bias
        self._first = torch.zeros_like(self.weight)  # AdamW's moments; the first one is SGD's buffer
        self._second = torch.zeros_like(self.weight)
        self._gradient = torch.empty_like(self.weight)  # kept, as fresh memory costs more than what is done in it
        self._steps = 0

    def logits(self, features: Tensor) -> Tensor:
        """[B, K] to [B, H, C]."""
        heads, classes, _ = self.weight.shape
        return (features @ self.weight.flatten(0, 1).T).view(-1, heads, classes)

    def step(self, step: Step) -> None:
        slopes = F.hardshrink(self.logits(step.features).softmax(dim=2) - step.targets[:, None], LEARNED)
        slopes *= step.shares[:, None, None]
        torch.mm(slopes.flatten(1).T, step.features, out=self._gradient.flatten(0, 1))
        gradient = self._gradient
        norms = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
        self.finite &= norms.flatten().isfinite()
        if self._optim.clip_norm is not None:
            gradient *= (self._optim.clip_norm / (norms + 1e-6)).clamp(max=1)
        self._steps += 1
        if self._optim.name == "sgd":
            self._sgd(gradient, self.lr * step.factor)
        else:
            self._adamw(gradient, self.lr * step.factor)

    def score(self, features: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """How many of a batch are right, and the sum of their losses: float64 [2, H]."""
        logits = self.logits(features)
        right = logits.argmax(dim=2) == targets[:, None]
        expanded = targets[:, None].expand(right.shape)
        losses = F.cross_entropy(logits.transpose(1, 2), expanded, reduction="none")
        return torch.stack([(part * valid[:, None]).double().sum(dim=0) for part in (right, losses)])

    def _adamw(self, gradient: Tensor, lr: Tensor) -> None:
        self._decayed.mul_(1 - lr * self.weight_decay)
        self._first.lerp_(gradient, 1 - BETAS[0])
        self._second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        # weight -= lr * m / (sqrt(v) + eps), m and v corrected for their start. To save a pass -lr goes below the line.
        lr = -lr / (1 - BETAS[0] ** self._steps)
        below = torch.sqrt(self._second, out=gradient).div_(lr * math.sqrt(1 - BETAS[1] ** self._steps)).add_(EPS / lr)
        self.weight.addcdiv_(self._first, below)

    def _sgd(self, gradient: Tensor, lr: Tensor) -> None:
        momentum = self._optim.momentum
        gradient[..., : self._decayed.shape[2]].addcmul_(self._decayed, self.weight_decay)
        if momentum:
            self._first.mul_(momentum).add_(gradient)
            gradient.add_(self._first, alpha=momentum)
        self.weight.addcmul_(gradient, -lr)


@dataclass(frozen=True)
class _Search:
    """What the search of a stage goes by."""

    name: str
    stage: StageConfig
    optim: OptimConfig
    features: Features
    dropout: nn.Sequential
    head: nn.Linear
    sampler: TrainSampler
    seed: int
    device: torch.device

    def read(self, dataset: FeatureDataset, keys: list[SampleKey]) -> tuple[Tensor, Batch]:
        """Features float32 [N, D] on the device, and the batch they are of."""
        batch = dataset.__getitems__(keys)
        return batch.images.to(self.device).float(), batch

    def with_ones(self, features: Tensor) -> Tensor:
        return features if self.head.bias is None else F.pad(features, (0, 1), value=1.0)

    def steps(self, epoch: int, keys: list[SampleKey], first: int) -> list[Step]:
        """The batches of `keys`, which begin at step `first` of the epoch."""
        size, classes, smooth = self.sampler.global_batch_size, self.head.out_features, self.optim.label_smoothing
        total = self.stage.epochs * self.sampler.steps_per_epoch
        features, batch = self.read(self.features.train, keys)
        targets = F.one_hot(batch.targets, classes).float() * (1 - smooth) + smooth / classes
        columns = (features, targets.to(self.device), batch.valid.to(self.device).float() / size)
        parts = zip(*(torch.split(column, size) for column in columns), strict=True)
        steps = []
        for number, (part, target, share) in enumerate(parts, start=epoch * self.sampler.steps_per_epoch + first):
            seed_draws(self.device, self.seed, "step", self.name, number, 0, 0)  # as one rank would draw
            factor = lr_factor(number, total, self.optim.warmup, self.optim.schedule)
            steps.append(Step(self.with_ones(self.dropout(part)), target, share, factor))
        return steps


def grid(stage: StageConfig, optim: OptimConfig) -> list[Settings]:
    """All pairs, learning rates outermost; what the search leaves out is as the stage has it."""
    rates, decays = stage.search.lr or [stage.lr], stage.search.weight_decay or [optim.weight_decay]
    return [Settings(*pair) for pair in itertools.product(rates, decays)]


def known_choice(stage: StageConfig, optim: OptimConfig, record: StageRecord | None) -> tuple[StageConfig, OptimConfig]:
    """Both with what a search has found, if there was one; and then with no search left to do."""
    if record is None or record.search is None:
        return stage, optim
    return (
        dataclasses.replace(stage, lr=record.search["lr"], search=SearchConfig()),
        dataclasses.replace(optim, weight_decay=record.search["weight_decay"]),
    )


def search_stage(
    job: Job, name: str, stage: StageConfig, optim: OptimConfig, ready: Ready
) -> tuple[StageConfig, OptimConfig]:
    """Search for a stage that is ready to begin, and put the result in its record: both with what was found.

    Raises:
        UserError: the stage trains something else than a single linear layer on features.
        NonFiniteError: not one head came to a finite loss.
        StopAgreedError: on all ranks alike. Nothing is kept.
    """
    began, info, record = time.monotonic(), job.info, job.state.stages[name]
    info.phase = f"the search for stage {name}"
    dropout, head = _parts(ready.network, name)
    assert ready.features is not None
    sampler = TrainSampler(
        len(ready.features.train), global_batch_size=job.config.data.global_batch_size, world_size=1, rank=0,
        seed=job.config.seed, stage=name,
    )  # fmt: skip
    search = _Search(name, stage, optim, ready.features, dropout, head, sampler, job.config.seed, info.device)
    found = search_heads(job, search)
    record.search = {**found, "seconds": time.monotonic() - began}
    logger.info(
        "\nsearch for stage %s: %d heads in %.1f s; lr %g with weight decay %g is best, top-1 %.4f on val",
        name, len(found["heads"]), record.search["seconds"], found["lr"], found["weight_decay"], found["top1"],
    )  # fmt: skip
    return known_choice(stage, optim, record)


@torch.no_grad()
def search_heads(job: Job, search: _Search) -> dict[str, Any]:
    """Train the heads of the grid, and choose: by top-1 on val, then by loss there, then the first.

    Pieces of the grid go to the ranks in turn. They are the same for any number of ranks, and so is what comes out, on
    all ranks alike: `lr`, `weight_decay`, `top1` and `loss` of the best, and `heads` with those of all.
    """
    info, settings = job.info, grid(search.stage, search.optim)
    pieces = _pieces(len(settings), (search.head.in_features + 1) * search.head.out_features, info.device)
    mine = [Heads(search.head, settings[at], search.optim, info.device) for at in pieces[info.rank :: info.world_size]]
    _train(search, mine, job.agreement, show=info.is_main)
    parts = gather_objects(info, _scores(search, mine, job.agreement))
    scores = [row for i in range(len(pieces)) for row in parts[i % info.world_size][i // info.world_size]]
    heads = [{**each._asdict(), **score} for each, score in zip(settings, scores, strict=True)]
    best = min((head for head in heads if head["loss"] is not None), key=_rank, default=None)
    if best is None:
        raise NonFiniteError(
            f"of the {len(heads)} heads of stages.{search.name}.search none came to a finite loss; try lower learning "
            f"rates, or a longer optim.warmup"
        )
    return {**best, "heads": heads}


def _rank(head: dict[str, Any]) -> tuple[float, float]:
    return -head["top1"], head["loss"]


def _parts(network: Network, name: str) -> tuple[nn.Sequential, nn.Linear]:
    """What comes before the head and is drawn, and the head."""
    layers = network.suffix if isinstance(network, FeatureNetwork) else None
    if isinstance(layers, nn.Sequential) and not list(layers[:-1].parameters()) and isinstance(layers[-1], nn.Linear):
        return layers[:-1], layers[-1]
    raise UserError(
        f"stages.{name}.search: the stage trains something else than a single linear layer on features; give it "
        f"unfreeze=head, or, if this model's head is something else, leave the search out"
    )


def _pieces(heads: int, size: int, device: torch.device) -> list[slice]:
    """Equal parts of so many heads of `size` weights; a function of these and of the kind of device alone."""
    parts = min(heads, math.ceil(heads * size / TOGETHER[device.type]))
    ends = [heads * i // parts for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _blocks(keys: Iterable[SampleKey], multiple: int) -> Iterator[list[SampleKey]]:
    size, left = max(1, BLOCK // multiple) * multiple, iter(keys)
    while block := list(itertools.islice(left, size)):
        yield block


def _train(search: _Search, pieces: list[Heads], agreement: Agreement, *, show: bool) -> None:
    """All epochs. A rank without heads goes along, so that all can agree to stop."""
    bar = Progress(f"search for {search.name}", search.stage.epochs, show=show)
    for epoch in range(search.stage.epochs):
        search.sampler.set_position(epoch)
        done = 0
        for keys in _blocks(search.sampler, search.sampler.global_batch_size):
            agreement.check()
            steps = search.steps(epoch, keys, done) if pieces else []
            for heads in pieces:
                for step in steps:
                    heads.step(step)
            done += len(keys) // search.sampler.global_batch_size
        bar.advance()
    bar.close()


def _scores(search: _Search, pieces: list[Heads], agreement: Agreement) -> list[list[dict[str, float | None]]]:
    """For each piece and head, top-1 and mean loss on val, from counts; None where a number was not finite."""
    sums = [torch.zeros(2, len(heads.weight), dtype=torch.float64, device=search.device) for heads in pieces]
    count = 0
    for keys in _blocks((SampleKey(i, 0, i) for i in range(len(search.features.val))), 1):
        agreement.check()
        if pieces:
            features, batch = search.read(search.features.val, keys)
            features, targets = search.with_ones(features), batch.targets.to(search.device)
            valid = batch.valid.to(search.device)
            count += int(batch.valid.sum())
            for heads, total in zip(pieces, sums, strict=True):
                total += heads.score(features, targets, valid)
    return [
        [_score(top1, loss, finite) for top1, loss, finite in zip(*shares, heads.finite.tolist(), strict=True)]
        for heads, shares in zip(pieces, [(total / max(1, count)).tolist() for total in sums], strict=True)
    ]


def _score(top1: float, loss: float, finite: bool) -> dict[str, float | None]:
    sound = finite and math.isfinite(loss)
    return {"top1": top1 if sound else None, "loss": loss if sound else None}
