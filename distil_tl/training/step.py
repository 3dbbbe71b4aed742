"""A stage's network and optimizer, and one optimizer step after another."""

from __future__ import annotations

import collections
import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from distil_tl.data.index import Index
from distil_tl.data.loader import Batch
from distil_tl.data.sampler import TrainSampler
from distil_tl.distributed.collectives import average_over_ranks, gather_objects, max_over_ranks
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.graph.equivalence import undisturbed
from distil_tl.models.transfer import TransferModel
from distil_tl.training.metrics import Meter
from distil_tl.training.network import Network
from distil_tl.training.optim import OptimConfig, build_optimizer, clip_gradients, lr_factor, set_lr
from distil_tl.training.stage import StageConfig, apply_stage
from distil_tl.utils.errors import NonFiniteError
from distil_tl.utils.log import printable
from distil_tl.utils.rng import seed_draws

# Frozen statistics don't move, and moving ones are averaged at each epoch's end. Newer torch renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


@dataclass
class StageRun:
    """What one stage trains with; built anew at each stage boundary."""

    name: str
    network: nn.Module  # the Network, under DDP when there are several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    total_steps: int
    moving_statistics: bool  # BatchNorm statistics move and are averaged over the ranks after each step
    first_bad_step: Tensor  # of the stage; infinite while all is well. From it on the optimizer changes nothing
    recent: collections.deque[tuple[int, Tensor]]  # (stage step, images) of the last steps, to name the bad ones

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        mine = [group["param_names"] for group in self.optimizer.param_groups]
        theirs = [group["param_names"] for group in state["optimizer"]["param_groups"]]
        if mine != theirs:
            raise RuntimeError(f"the checkpoint's optimizer trains other parameters than stage {self.name} does")
        self.optimizer.load_state_dict(state["optimizer"])
        # Fused optimizers go through memory as it lies, so moments must lie as their parameters do: channels last.
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.scaler.load_state_dict(state["scaler"])


def begin_stage(
    info: DistInfo,
    model: TransferModel,
    network: Network,
    name: str,
    stage: StageConfig,
    optim: OptimConfig,
    total_steps: int,
    remember: int,
) -> StageRun:
    """Apply a stage's freezing, then wrap and build the optimizer for what is left trainable.

    DDP notes which parameters to reduce when it wraps, so it must wrap after the freezing, at every boundary.
    `remember` is for how many steps to know the images of a batch, at least those between two `check_finite`.
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
        if optim.compression == "bf16":
            wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return StageRun(
        name=name,
        network=wrapped,
        optimizer=build_optimizer(model, stage, optim),
        scaler=torch.amp.GradScaler(info.device.type, enabled=network.compute.dtype == torch.float16),
        total_steps=total_steps,
        moving_statistics=stage.batch_norm == "train" and info.world_size > 1,
        first_bad_step=torch.full((), torch.inf, device=info.device),
        recent=collections.deque(maxlen=remember),
    )


def settle_buckets(info: DistInfo, run: StageRun, inputs: Tensor) -> None:
    """Have DDP pack the gradients as it will from now on, by a step on `inputs` that leaves no trace.

    It packs them anew after its first step, in the order in which they came, and where there are more than two ranks
    the order of a sum depends on that: a run that goes on must add as one that was never interrupted.
    """
    if not isinstance(run.network, DistributedDataParallel):
        return
    with undisturbed(run.network, info.device):
        run.network(inputs).sum().backward()
    run.optimizer.zero_grad(set_to_none=True)


def train_epoch(
    info: DistInfo,
    run: StageRun,
    batches: Iterator[Batch],
    sampler: TrainSampler,
    meter: Meter,
    *,
    accumulation: int,
    optim: OptimConfig,
    seed: int,
) -> Iterator[int]:
    """Take the optimizer steps of an epoch from the sampler's position on, giving control back after each one.

    Yields the samples of the epoch consumed so far, over all ranks. The gradient is that of the sum of losses over
    the global batch divided by its size, whatever the number of ranks and micro-batches; an image that was left out
    adds nothing to the sum.
    """
    share = sampler.global_batch_size // info.world_size
    first = sampler.epoch * sampler.steps_per_epoch
    for step in range(sampler.consumed // sampler.global_batch_size, sampler.steps_per_epoch):
        stage_step = first + step
        set_lr(run.optimizer, lr_factor(stage_step, run.total_steps, optim.warmup, optim.schedule))
        loss = torch.zeros((), device=info.device)
        for micro in range(accumulation):
            batch = next(batches)
            # Dropout and stochastic depth draw from here; keyed, so that a resumed run draws the same. Not before the
            # batch is there: a loader that begins draws too.
            seed_draws(info.device, seed, "step", run.name, stage_step, micro, info.rank)
            run.recent.append((stage_step, batch.indices))
            targets = batch.targets.to(info.device, non_blocking=True)
            valid = batch.valid.to(info.device, non_blocking=True)
            with _reduce_after(run.network, last=micro == accumulation - 1):
                logits = run.network(batch.images.to(info.device, non_blocking=True))
                losses = F.cross_entropy(logits, targets, label_smoothing=optim.label_smoothing, reduction="none")
                micro_loss = (losses * valid).sum() / share
                run.scaler.scale(micro_loss).backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.detach()
            meter.update(logits.detach(), targets, losses.detach(), valid)
        _optimizer_step(run, loss, optim.clip_norm, stage_step)
        if run.moving_statistics:
            average_over_ranks(info, moving_statistics(run.network))
        yield (step + 1) * sampler.global_batch_size


def moving_statistics(network: nn.Module) -> list[Tensor]:
    """Running means and variances of the normalisation layers that are in training mode."""
    moving = [m for m in network.modules() if isinstance(m, _NormBase) and m.training and m.running_mean is not None]
    return [buffer for m in moving for buffer in (m.running_mean, m.running_var) if buffer is not None]


def _reduce_after(network: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are reduced over the ranks once a step, with the last micro-batch."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return contextlib.nullcontext()


def _optimizer_step(run: StageRun, loss: Tensor, clip_norm: float | None, stage_step: int) -> None:
    """Step, unless this or an earlier gradient was not finite; decided on the device, without waiting for it."""
    run.scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.optimizer, clip_norm)
    # In fp16 gradients overflow now and then by design, and the scaler skips the step; the loss must not.
    healthy = (loss if run.scaler.is_enabled() else norm).isfinite()
    run.first_bad_step.copy_(torch.where(healthy, run.first_bad_step, run.first_bad_step.clamp(max=stage_step)))
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        run.optimizer.found_inf = run.first_bad_step.isfinite().float()  # type: ignore[attr-defined]
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def check_finite(info: DistInfo, run: StageRun, index: Index) -> None:
    """Look at what the device noted since the last call.

    Raises:
        NonFiniteError: on all ranks alike, with the first bad step of any, and its images. The weights are those
            before it.
    """
    bad = -max_over_ranks(info, -float(run.first_bad_step))
    if bad == float("inf"):
        return
    mine = [printable(index.relative(i)) for step, images in run.recent if step == bad for i in images.tolist()]
    names = [name for part in gather_objects(info, mine) for name in part]
    shown = ", ".join(names[:64]) + (f" and {len(names) - 64} more" if len(names) > 64 else "")
    raise NonFiniteError(
        f"the loss or its gradient is not finite in step {int(bad) + 1} of stage {run.name}; the weights are as before "
        f"it, and the last checkpoint stays. Try a lower stages.{run.name}.lr, a longer optim.warmup, or "
        f"precision=fp32. The images of that batch, below {index.root}: {shown}"
    )
