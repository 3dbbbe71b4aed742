"""The training state of one stage, and the parts of an optimizer step."""

from __future__ import annotations

import collections
import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from distil_tl.data.index import Index
from distil_tl.data.loader import Batch, BatchPlan
from distil_tl.data.sampler import TrainSampler, in_batches
from distil_tl.data.source import ImageSource
from distil_tl.data.stage_batches import StageBatches
from distil_tl.distributed.collectives import average_over_ranks, gather_objects, max_over_ranks
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.graph.equivalence import preserve_state
from distil_tl.rundir.state import Position
from distil_tl.training.metrics import Meter
from distil_tl.training.network import Network
from distil_tl.training.optim import build_optimizer, clip_gradients, current_lr
from distil_tl.training.records import Moment
from distil_tl.training.stage import Stage
from distil_tl.training.stage_setup import StageSetup
from distil_tl.utils.errors import NonFiniteError
from distil_tl.utils.log import printable

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel

# Frozen statistics do not change, and those that train are averaged after each step. Newer torch renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


@dataclass
class StageTraining:
    """The training state of one stage, created when the stage begins.

    Attributes:
        inner: the network that is trained.
        network: the same, under DDP when there are several ranks.
        batches: of training and of the evaluations.
        images: index of the training images, to name them in messages.
        accumulation: micro-batches of a step.
        total_steps: of the stage.
        trains_statistics: BatchNorm statistics are updated, and averaged over the ranks after each step.
        first_bad_step: of the stage, on the device; infinite if there is none. The optimizer skips steps from it on.
        recent: (step of the stage, image indices) of the last micro-batches, to name those of a bad step.
        meter: training metrics of the current epoch.
    """

    stage: Stage
    inner: Network
    network: nn.Module
    batches: StageBatches
    images: Index
    accumulation: int
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    total_steps: int
    trains_statistics: bool
    first_bad_step: Tensor
    recent: collections.deque[tuple[int, Tensor]]
    meter: Meter = field(repr=False)

    @property
    def sampler(self) -> TrainSampler:
        return self.batches.sampler

    def steps_left(self, position: Position) -> range:
        """Steps of the stage that its current epoch has left, from `position` on."""
        first = position.epoch * self.sampler.steps_per_epoch
        done = position.consumed // self.sampler.global_batch_size
        return range(first + done, first + self.sampler.steps_per_epoch)

    def next_batch(self) -> Batch:
        """The next micro-batch. The time until it is there counts as waiting."""
        began = time.monotonic()
        batch = self.batches.next()
        self.meter.waited += time.monotonic() - began
        return batch

    def moment(self, position: Position) -> Moment:
        return Moment(self.stage.name, position.epoch, current_lr(self.optimizer))

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        ours = [group["param_names"] for group in self.optimizer.param_groups]
        saved = [group["param_names"] for group in state["optimizer"]["param_groups"]]
        if ours != saved:
            raise RuntimeError(f"the checkpoint's optimizer trains other parameters than stage {self.stage.name} does")
        self.optimizer.load_state_dict(state["optimizer"])
        # Fused optimizers require that moments have the memory format of their parameters.
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.scaler.load_state_dict(state["scaler"])


def begin_stage(
    info: DistInfo,
    stage: Stage,
    model: TransferModel,
    setup: StageSetup,
    source: ImageSource,
    plan: BatchPlan,
    log_every: int,
) -> StageTraining:
    """Build the loaders and the optimizer, and wrap the network, for a stage whose freezing is applied.

    DDP registers the trainable parameters when it wraps a network, so each stage wraps its network again.

    Args:
        log_every: steps between two calls of `check_finite`, at most.
    """
    batches = build_loaders(stage, setup, source, plan)
    network = wrap_in_ddp(info, setup.network, stage.optim.compression)
    optimizer = build_optimizer(model, stage.config, stage.optim)
    optimizer.zero_grad(set_to_none=True)  # a trial that failed may have left gradients
    fix_bucket_order(info, network, optimizer, setup.dummy)
    return StageTraining(
        stage=stage,
        inner=setup.network,
        network=network,
        batches=batches,
        images=source.index("train"),
        accumulation=plan.accumulation,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(info.device.type, enabled=setup.network.compute.dtype == torch.float16),
        total_steps=stage.config.epochs * batches.sampler.steps_per_epoch,
        trains_statistics=stage.config.batch_norm == "train" and info.world_size > 1,
        first_bad_step=torch.full((), torch.inf, device=info.device),
        recent=collections.deque(maxlen=log_every * plan.accumulation),
        meter=Meter(info, len(source.index("train").classes)),
    )


def build_loaders(stage: Stage, setup: StageSetup, source: ImageSource, plan: BatchPlan) -> StageBatches:
    """The loaders of a stage, of features or images. Nothing is loaded yet."""
    sampler = source.sampler(seed=stage.seed, stage=stage.name, epochs=stage.config.epochs)
    val_sampler = source.eval_batches("val")
    if setup.features is None:
        dataset = source.train_dataset("train", stage.image_size, stage.augment, seed=stage.seed, stage=stage.name)
        return StageBatches(
            source, sampler, source.train_loader(dataset, sampler, plan.micro),
            val_sampler, source.eval_loader("val", stage.image_size, val_sampler),
        )  # fmt: skip
    return StageBatches(
        source, sampler, source.feature_loader(setup.features.train, in_batches(sampler, plan.micro), plan.micro),
        val_sampler, source.feature_loader(setup.features.val, val_sampler, val_sampler.batch_size),
    )  # fmt: skip


def wrap_in_ddp(info: DistInfo, network: nn.Module, compression: str) -> nn.Module:
    """The network under DDP, or itself on a single rank. `compression` is `optim.compression`."""
    if info.world_size == 1:
        return network
    wrapped = DistributedDataParallel(
        network,
        device_ids=[info.device] if info.device.type == "cuda" else None,
        **_NO_BUFFER_SYNC,
        gradient_as_bucket_view=True,
    )
    if compression == "bf16":
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return wrapped


def fix_bucket_order(info: DistInfo, network: nn.Module, optimizer: torch.optim.Optimizer, dummy: Tensor) -> None:
    """Let DDP arrange its gradient buckets now, by a step on a dummy batch without side effects.

    DDP rearranges them after its first step, in the order in which gradients arrive. With more than two ranks the order
    of a sum depends on it, and a resumed run must add in the same order as one that was never interrupted.
    """
    if not isinstance(network, DistributedDataParallel):
        return
    with preserve_state(network, info.device):
        network(dummy).sum().backward()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def reduce_gradients(network: nn.Module, *, now: bool) -> Iterator[None]:
    """Let backward average the gradients over the ranks, or only accumulate them here: once a step is enough."""
    if isinstance(network, DistributedDataParallel) and not now:
        with network.no_sync():
            yield
    else:
        yield


def optimizer_step(training: StageTraining, loss: Tensor, step: int) -> None:
    """Clip and step, unless this or an earlier gradient is not finite; decided on the device, without waiting for it.

    Args:
        loss: of the step, on the device.
        step: of the stage.
    """
    optimizer, scaler = training.optimizer, training.scaler
    scaler.unscale_(optimizer)
    norm = clip_gradients(optimizer, training.stage.optim.clip_norm)
    # In fp16 gradients overflow now and then by design, and the scaler skips the step; the loss must not.
    healthy = (loss if scaler.is_enabled() else norm).isfinite()
    bad = training.first_bad_step
    bad.copy_(torch.where(healthy, bad, bad.clamp(max=step)))
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = bad.isfinite().float()  # type: ignore[attr-defined]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def average_statistics(info: DistInfo, training: StageTraining) -> None:
    """Average BatchNorm statistics over the ranks, where they train."""
    if training.trains_statistics:
        average_over_ranks(info, trained_statistics(training.network))


def trained_statistics(network: nn.Module) -> list[Tensor]:
    """Running means and variances of the normalisation layers in training mode."""
    norms = [m for m in network.modules() if isinstance(m, _NormBase) and m.training and m.running_mean is not None]
    return [buffer for m in norms for buffer in (m.running_mean, m.running_var) if buffer is not None]


def check_finite(info: DistInfo, training: StageTraining) -> None:
    """Read from the device whether a loss or gradient was not finite since the last call.

    Raises:
        NonFiniteError: on all ranks alike, naming the first such step and its images. The weights are those before it.
    """
    bad = -max_over_ranks(info, -float(training.first_bad_step))
    if bad == float("inf"):
        return
    index, stage = training.images, training.stage.name
    mine = [
        printable(index.relative_path(i)) for step, images in training.recent if step == bad for i in images.tolist()
    ]
    names = [name for part in gather_objects(info, mine) for name in part]
    shown = ", ".join(names[:64]) + (f" and {len(names) - 64} more" if len(names) > 64 else "")
    raise NonFiniteError(
        f"the loss or its gradient is not finite in step {int(bad) + 1} of stage {stage}; the weights are as before "
        f"that step, and the last checkpoint is kept. Try a lower stages.{stage}.lr, a longer optim.warmup, or "
        f"precision=fp32. The images of that batch, below {index.root}: {shown}"
    )
