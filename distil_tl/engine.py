"""One optimizer step after another, and exact evaluation."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distil_tl.data.loader import Loader, read_batches
from distil_tl.data.sampler import TrainSampler
from distil_tl.data.transforms import Normalize
from distil_tl.distributed import DistInfo, gather_rows, sum_over_ranks
from distil_tl.errors import NonFiniteError
from distil_tl.keyed import keyed_seed
from distil_tl.log import Progress
from distil_tl.metrics import ClassificationMetrics
from distil_tl.models import TransferModel
from distil_tl.optim import OptimConfig, build_optimizer, clip_gradients, lr_factor, set_lr
from distil_tl.stages import StageConfig, apply_stage

# Frozen statistics don't move, and moving ones are averaged at each epoch's end. Newer torch renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None is plain float32. `auto`: bf16 (else fp16) on CUDA, float32 on CPU."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class Network(nn.Module):
    """A transfer model with its normalisation: uint8 images [N, 3, S, S] to float32 logits [N, C]."""

    def __init__(self, model: TransferModel, dtype: torch.dtype | None, device: torch.device) -> None:
        super().__init__()
        self.normalize = Normalize(model.preprocess)
        self.module = model.module
        self.dtype = dtype
        convolutional = any(isinstance(m, nn.Conv2d) for m in model.module.modules())
        self.memory_format = torch.channels_last if convolutional else torch.contiguous_format
        self.to(device).to(memory_format=self.memory_format)

    def forward(self, images: Tensor) -> Tensor:
        images = self.normalize(images).contiguous(memory_format=self.memory_format)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self.module(images)
        return logits.float()


@dataclass
class StageRun:
    """What one stage trains with; built anew at each stage boundary."""

    name: str
    network: nn.Module  # the Network, under DDP when there are several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    not_finite: Tensor  # 1 from the first bad step on; the optimizer then changes nothing
    total_steps: int

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        mine = [group["param_names"] for group in self.optimizer.param_groups]
        theirs = [group["param_names"] for group in state["optimizer"]["param_groups"]]
        if mine != theirs:
            raise RuntimeError(f"the checkpoint's optimizer trains other parameters than stage {self.name} does")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def begin_stage(
    info: DistInfo,
    model: TransferModel,
    network: Network,
    name: str,
    stage: StageConfig,
    optim: OptimConfig,
    total_steps: int,
) -> StageRun:
    """Apply a stage's freezing, then wrap and build the optimizer for what is left trainable.

    DDP notes which parameters to reduce when it wraps, so it must wrap after the freezing, at every boundary.
    """
    apply_stage(model, stage)
    wrapped: nn.Module = network
    if info.world_size > 1:
        wrapped = DistributedDataParallel(
            network,
            device_ids=[info.device] if info.device.type == "cuda" else None,
            **_NO_BUFFER_SYNC,
            gradient_as_bucket_view=True,
        )
    return StageRun(
        name=name,
        network=wrapped,
        optimizer=build_optimizer(model, stage, optim),
        scaler=torch.amp.GradScaler(info.device.type, enabled=network.dtype == torch.float16),
        not_finite=torch.zeros((), device=info.device),
        total_steps=total_steps,
    )


def train_epoch(
    info: DistInfo,
    run: StageRun,
    loader: Loader,
    sampler: TrainSampler,
    metrics: ClassificationMetrics,
    *,
    accumulation: int,
    optim: OptimConfig,
    seed: int,
) -> Iterator[int]:
    """Take the optimizer steps of an epoch from the sampler's position on, giving control back after each one.

    Yields the samples of the epoch consumed so far, over all ranks. The gradient is that of the mean loss over the
    global batch, whatever the number of ranks and micro-batches.
    """
    batches = read_batches(loader)
    share = sampler.global_batch_size // info.world_size
    first = sampler.epoch * sampler.steps_per_epoch
    for step in range(sampler.consumed // sampler.global_batch_size, sampler.steps_per_epoch):
        stage_step = first + step
        set_lr(run.optimizer, lr_factor(stage_step, run.total_steps, optim.warmup, optim.schedule))
        # Dropout and stochastic depth draw from here; keyed, so that a resumed run draws the same.
        torch.manual_seed(keyed_seed(seed, "step", run.name, stage_step, info.rank))
        for micro in range(accumulation):
            batch = next(batches)
            images = batch.images.to(info.device, non_blocking=True)
            targets = batch.targets.to(info.device, non_blocking=True)
            with _reduce_after(run.network, last=micro == accumulation - 1):
                logits = run.network(images)
                loss = F.cross_entropy(logits, targets, label_smoothing=optim.label_smoothing, reduction="sum")
                run.scaler.scale(loss / share).backward()  # type: ignore[no-untyped-call]
            metrics.update(logits.detach(), targets, loss.detach())
        _optimizer_step(run, loss.detach(), optim.clip_norm)
        yield (step + 1) * sampler.global_batch_size


def _reduce_after(network: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are reduced over the ranks once a step, with the last micro-batch."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return contextlib.nullcontext()


def _optimizer_step(run: StageRun, loss: Tensor, clip_norm: float | None) -> None:
    """Step, unless the gradient is not finite; decided on the device, without waiting for it."""
    run.scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.optimizer, clip_norm)
    if run.scaler.is_enabled():
        # fp16 overflows now and then by design: the scaler skips that step and lowers its scale.
        run.not_finite.copy_(torch.maximum(run.not_finite, (~loss.isfinite()).float()))
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        run.not_finite.copy_(torch.maximum(run.not_finite, (~norm.isfinite()).float()))
        run.optimizer.found_inf = run.not_finite  # type: ignore[attr-defined]
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def check_finite(info: DistInfo, run: StageRun, step: int) -> None:
    """Look at what the device noted since the last call.

    Raises:
        NonFiniteError: on all ranks alike. The weights are those before the first bad step.
    """
    if sum_over_ranks(info, run.not_finite.clone()).item():
        raise NonFiniteError(
            f"stage {run.name}: the loss or its gradient is not finite any more, noticed at step {step}; the weights "
            f"are as before it and the last checkpoint stays. Try a lower stages.{run.name}.lr, a longer "
            f"optim.warmup, or precision=fp32"
        )


@dataclass
class Evaluation:
    """Metrics over a whole split, on all ranks alike.

    `mistakes` are the surest wrong predictions: (index, target, prediction, probability).
    """

    metrics: ClassificationMetrics
    mistakes: list[tuple[int, int, int, float]]


@torch.no_grad()
def evaluate(
    info: DistInfo,
    network: Network,
    loader: Loader,
    num_classes: int,
    *,
    confusion: bool = False,
    keep_mistakes: int = 0,
    show: bool = False,
) -> Evaluation:
    """Evaluate every sample once. Each rank runs its own share, of whatever length, and only counts are combined."""
    was_training = network.training
    network.eval()
    metrics = ClassificationMetrics(num_classes, info.device, confusion=confusion)
    mistakes = torch.empty(0, 4, dtype=torch.float64)
    bar = Progress("evaluate", len(loader), show=show and info.is_main)
    for batch in read_batches(loader):
        targets = batch.targets.to(info.device, non_blocking=True)
        logits = network(batch.images.to(info.device, non_blocking=True))
        metrics.update(logits, targets, F.cross_entropy(logits, targets, reduction="none").double().sum())
        if keep_mistakes:
            mistakes = _surest(torch.cat([mistakes, _wrong(logits, targets, batch.indices)]), keep_mistakes)
        bar.advance()
    bar.close()
    network.train(was_training)
    if keep_mistakes:
        mistakes = _surest(gather_rows(info, mistakes, keep_mistakes), keep_mistakes)
    rows = [(int(i), int(t), int(p), probability) for i, t, p, probability in mistakes.tolist()]
    return Evaluation(metrics.reduce(info), rows)


def _wrong(logits: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
    """Rows (index, target, prediction, probability) of the wrong predictions, float64 [M, 4] on the CPU."""
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    rows = torch.stack([indices.to(targets.device), targets, predicted, probability], dim=1).double()
    return rows[predicted != targets].cpu()


def _surest(rows: Tensor, count: int) -> Tensor:
    # By probability, then by index, so that ties come in one order on any number of ranks.
    order = sorted(range(len(rows)), key=lambda i: (-rows[i, 3].item(), rows[i, 0].item()))
    return rows[order[:count]]
