"""Head search: a grid of learning rates and weight decays for a linear head, trained at once on features.

A linear head is small, so training many of them costs little more than reading the features. Each trains as the stage
would train it alone: from the same weights, on the same batches, by the same schedule. Only the choice is kept. The
stage then trains with it as with any other settings.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.data.device import to_device
from distil_tl.data.feature_cache import FeatureDataset
from distil_tl.data.loader import Batch
from distil_tl.data.read_ahead import PinnedLoader
from distil_tl.data.sampler import SampleKey, TrainSampler
from distil_tl.data.source import ImageSource
from distil_tl.distributed.collectives import gather_objects, max_over_ranks
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.fitted_heads import FittedHead
from distil_tl.rundir.state import StageRecord
from distil_tl.training.batched_heads import BatchedHeads, HeadBatch, HeadSettings
from distil_tl.training.features import Features
from distil_tl.training.head_choice import choose_head, how_chosen
from distil_tl.training.losses import Loss, training_loss
from distil_tl.training.memory import free_memory, is_out_of_memory
from distil_tl.training.metrics import ClassificationMetrics, counts
from distil_tl.training.network import dropout_and_head
from distil_tl.training.optim import lr_factor
from distil_tl.training.spread import Spread, width
from distil_tl.training.stage import Stage
from distil_tl.training.stage_setup import StageSetup
from distil_tl.utils.errors import NonFiniteError, UserError
from distil_tl.utils.log import Progress, logger
from distil_tl.utils.rng import seed_torch

# Weights that train together. On a CPU they fit its cache with their moments; a GPU is best with few, large kernels.
GROUP_SIZE = {"cpu": 200_000, "cuda": 1 << 26}
Scores: TypeAlias = "list[dict[str, Any]]"  # of each head of a group: top1, loss and the metric; its Spread for JSON
BLOCK = 2048  # images whose features are read at once


@dataclass(frozen=True)
class HeadSearch:
    """The stage, data and layers of a search; with `spread` it also counts what intervals need."""

    stage: Stage
    features: Features
    dropout: nn.Sequential
    head: nn.Linear | FittedHead
    sampler: TrainSampler
    loss: Loss
    device: torch.device
    spread: bool = False

    def load(self, dataset: FeatureDataset, blocks: Iterable[list[SampleKey]]) -> Iterator[Batch]:
        """The features of these images on the device. On CUDA a thread reads the next block meanwhile."""
        batches: Iterable[Batch] = map(dataset.__getitems__, blocks)
        if self.device.type == "cuda":
            batches = PinnedLoader(batches, self.device, ahead=2)
        return to_device(iter(batches), self.device)

    @property
    def linear(self) -> nn.Linear:
        """The head, of which a search trains copies."""
        assert isinstance(self.head, nn.Linear)
        return self.head

    def with_ones(self, features: Tensor) -> Tensor:
        """A column of ones for the bias, where the head has one."""
        return features if self.linear.bias is None else F.pad(features, (0, 1), value=1.0)

    def batches(self, epoch: int, block: Batch, first: int) -> list[HeadBatch]:
        """The global batches of a block, which start at step `first` of the epoch."""
        size, classes = self.sampler.global_batch_size, self.head.out_features
        optim, stage = self.stage.optim, self.stage
        smooth, total = optim.label_smoothing, stage.config.epochs * self.sampler.steps_per_epoch
        targets = F.one_hot(block.targets, classes).float() * (1 - smooth) + smooth / classes
        shares = self.loss.weighted(block.valid.float() / size, block.targets, block.indices)
        columns = (block.images.float(), targets, shares)
        parts = zip(*(torch.split(column, size) for column in columns), strict=True)
        found = []
        for step, (part, target, share) in enumerate(parts, start=epoch * self.sampler.steps_per_epoch + first):
            seed_torch(self.device, stage.seed, "step", stage.name, step, 0, 0)  # as on one rank
            factor = lr_factor(step, total, optim.warmup, optim.schedule)
            found.append(HeadBatch(self.with_ones(self.dropout(part)), target, share, factor))
        return found


def grid(stage: Stage) -> list[HeadSettings]:
    """All pairs, learning rates outermost. An empty list means the stage's own value."""
    search = stage.config.search
    return [
        HeadSettings(*pair)
        for pair in itertools.product(search.lr or [stage.config.lr], search.weight_decay or [stage.optim.weight_decay])
    ]


def search_head(
    info: DistInfo, stage: Stage, setup: StageSetup, source: ImageSource, record: StageRecord, agreement: Agreement
) -> Stage:
    """Search the grid of a stage that is about to begin. Returns the stage with the settings chosen.

    Args:
        record: of the stage; the result is noted in it.

    Raises:
        UserError: the stage trains something other than a single linear layer on features.
        NonFiniteError: no head has a finite loss.
        AllRanksStopError: on all ranks alike. Nothing is kept.
    """
    start = time.monotonic()
    info.phase = f"the search for stage {stage.name}"
    result = search_heads(info, prepare_search(info, stage, setup, source), agreement)
    record.search = {**result, "seconds": time.monotonic() - start}
    logger.info(
        "\nsearch for stage %s: %d heads in %.1f s; %s",
        stage.name, len(result["heads"]), record.search["seconds"], how_chosen(result, stage.metric),
    )  # fmt: skip
    return stage.with_search_result(record.search)


def prepare_search(info: DistInfo, stage: Stage, setup: StageSetup, source: ImageSource) -> HeadSearch:
    """What a search or a fit needs. Raises UserError if the stage trains something other than a single head."""
    dropout, head = dropout_and_head(setup.network, stage)
    assert setup.features is not None
    sampler = source.sampler(seed=stage.seed, stage=stage.name, epochs=stage.config.epochs, whole=True)
    images = source.index("train")
    loss = training_loss(stage.optim, stage.balance, images.class_counts, info.device, images.weights)
    return HeadSearch(stage, setup.features, dropout, head, sampler, loss, info.device)


@torch.no_grad()
def search_heads(info: DistInfo, search: HeadSearch, agreement: Agreement) -> dict[str, Any]:
    """Train the heads of the grid and choose one, as `choose_head` does.

    Groups of heads are divided among the ranks. They are the same for any number of ranks, and so is the result, on
    all ranks alike: `lr`, `weight_decay`, `top1`, `loss` and the metric of the chosen one, and the same of each in
    `heads`; with `search.spread` the `Spread` of the chosen one, too.
    """
    settings, rounds = grid(search.stage), 1
    while True:
        groups = _groups(len(settings), rounds * (search.head.in_features + 1) * search.head.out_features, info.device)
        mine = [settings[group] for group in groups[info.rank :: info.world_size]]
        own = _train_and_score(search, mine, rounds, agreement, show=info.is_main)
        if not max_over_ranks(info, float(own is None)):
            break
        rounds = _more_rounds(search, rounds, groups)
    parts = gather_objects(info, own)
    scores = [row for i in range(len(groups)) for row in parts[i % info.world_size][i // info.world_size]]
    heads = [{**each._asdict(), **score} for each, score in zip(settings, scores, strict=True)]
    val, stage, classes = search.features.val, search.stage, search.head.out_features
    spreads = [Spread.from_json(classes, head.pop("spread")) for head in heads if search.spread]
    chosen = choose_head(heads, stage.metric, stage.config.search.prefer, len(val) - len(val.bad()))
    if chosen is None:
        raise NonFiniteError(
            f"none of the {len(heads)} heads of stages.{stage.name}.search has a finite loss; try lower "
            f"learning rates, or a longer optim.warmup"
        )
    number = next(i for i, head in enumerate(heads) if all(head[key] == chosen[key] for key in HeadSettings._fields))
    return {**chosen, "heads": heads, **({"spread": spreads[number]} if search.spread else {})}


def _groups(heads: int, size: int, device: torch.device) -> list[slice]:
    """Equal groups of `heads` heads with `size` weights each: a function of these and of the kind of device alone."""
    parts = min(heads, math.ceil(heads * size / GROUP_SIZE[device.type]))
    ends = [heads * i // parts for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _blocks(keys: Iterable[SampleKey], size: int) -> Iterator[list[SampleKey]]:
    left = iter(keys)
    while block := list(itertools.islice(left, size)):
        yield block


def _more_rounds(search: HeadSearch, rounds: int, groups: list[slice]) -> int:
    """The number of rounds after memory ran out with `rounds`: twice as many, with half the heads in a group.

    Raises:
        UserError: memory does not suffice for a single head.
    """
    free_memory()
    if rounds >= len(groups) and all(group.stop - group.start == 1 for group in groups):
        raise UserError(
            f"the device has too little memory for a single head of stages.{search.stage.name}.search; use a device "
            f"with more free memory, or remove the search"
        )
    logger.warning(
        "out of memory in the search for stage %s: it begins again, in %d rounds with fewer heads each; the results "
        "are the same up to rounding", search.stage.name, 2 * rounds,
    )  # fmt: skip
    return 2 * rounds


def _train_and_score(
    search: HeadSearch, settings: list[list[HeadSettings]], rounds: int, agreement: Agreement, *, show: bool
) -> list[Scores] | None:
    """The scores of some groups of heads, trained in `rounds` rounds one after another; None if memory ran out.

    A rank without heads, or without memory, runs all epochs too, so that all ranks can agree to stop.
    """
    scores, complete = dict[int, Scores](), True
    for first in range(rounds):
        chosen = list(range(first, len(settings), rounds)) if complete else []
        groups = _Groups(search, [settings[i] for i in chosen])
        _train(search, groups, agreement, show=show)
        found = _score_heads(search, groups, agreement)
        scores |= dict(zip(chosen, found, strict=False))
        complete = complete and not groups.out_of_memory
    return [scores[i] for i in range(len(settings))] if complete else None


class _Groups:
    """Groups of heads that train together; none from the moment when memory has run out."""

    def __init__(self, search: HeadSearch, settings: list[list[HeadSettings]]) -> None:
        self.heads: list[BatchedHeads] = []
        self.out_of_memory = False
        with self.unless_out_of_memory():
            optim, loss = search.stage.optim, search.loss
            self.heads = [BatchedHeads(search.linear, group, optim, search.device, loss) for group in settings]

    @contextlib.contextmanager
    def unless_out_of_memory(self) -> Iterator[None]:
        """End the block at an out-of-memory error, and drop the heads."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.out_of_memory = True
            self.heads = []


def _train(search: HeadSearch, groups: _Groups, agreement: Agreement, *, show: bool) -> None:
    """All epochs."""
    epochs, sampler = search.stage.config.epochs, search.sampler
    steps = max(1, BLOCK // sampler.global_batch_size)  # of a block
    blocks = (
        keys for epoch in range(epochs) for keys in _blocks(sampler.keys(epoch), steps * sampler.global_batch_size)
    )
    loaded = search.load(search.features.train, blocks) if groups.heads else iter(())
    with Progress(f"search for {search.stage.name}", epochs, show=show) as bar:
        for epoch in range(epochs):
            for first in range(0, sampler.steps_per_epoch, steps):
                agreement.raise_if_stopping()
                with groups.unless_out_of_memory():
                    batches = search.batches(epoch, next(loaded), first) if groups.heads else []
                    for heads in groups.heads:
                        for batch in batches:
                            heads.step(batch)
            bar.advance()


def _score_heads(search: HeadSearch, groups: _Groups, agreement: Agreement) -> list[Scores]:
    """For each group and head, its figures on val, from counts; None where a number is not finite."""
    classes, val = search.head.out_features, search.features.val
    size = width(classes) if search.spread else counts(classes)
    sums = [heads.weight.new_zeros(len(heads.weight), size, dtype=torch.float64) for heads in groups.heads]
    blocks = _blocks((SampleKey(i, 0, i) for i in range(len(val))), BLOCK)
    loaded = search.load(val, blocks) if groups.heads else iter(())
    for _ in range(0, len(val), BLOCK):
        agreement.raise_if_stopping()
        if not groups.heads:
            continue
        with groups.unless_out_of_memory():
            block = next(loaded)
            features = search.with_ones(block.images.float())
            for heads, total in zip(groups.heads, sums, strict=True):
                total += heads.score(features, block.targets, block.valid, spread=search.spread)
    kept = dict.fromkeys(("top1", "loss", search.stage.metric))
    return [
        [_score(row, classes, kept, finite) for row, finite in zip(total.cpu(), fine, strict=True)]
        for total, fine in zip(sums, [heads.finite.tolist() for heads in groups.heads], strict=False)
    ]


def _score(row: Tensor, classes: int, kept: Iterable[str], finite: bool) -> dict[str, Any]:
    """The figures of a head from its sums."""
    figures = ClassificationMetrics.of(row[: counts(classes)], classes).compute()
    valid = finite and math.isfinite(figures["loss"])
    found: dict[str, Any] = {name: figures[name] if valid else None for name in kept}
    return {**found, "spread": Spread.of(row, classes).to_json()} if len(row) > counts(classes) else found
