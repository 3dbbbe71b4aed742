"""The training state of one stage, and the parts of an optimizer step."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from distil_tl.data.index import Index
from distil_tl.data.loader import Batch
from distil_tl.data.mixed_batches import dominant, mix
from distil_tl.data.sampler import TrainSampler
from distil_tl.distributed.collectives import average_over_ranks, gather_objects, max_of_each_over_ranks
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.state import Position
from distil_tl.training.compiling import compile_network
from distil_tl.training.losses import Loss
from distil_tl.training.memory import (
    PartSize,
    SavedStatistics,
    is_out_of_memory,
    restart_settings,
    until_memory_suffices,
)
from distil_tl.training.metrics import Meter
from distil_tl.training.network import Network
from distil_tl.training.optim import clip_gradients, current_lr
from distil_tl.training.records import Moment
from distil_tl.training.stage import Stage
from distil_tl.training.stage_weights import StageWeights
from distil_tl.utils.errors import NonFiniteError, RestartError, UserError
from distil_tl.utils.log import logger, printable

if TYPE_CHECKING:
    from distil_tl.data.stage_batches import StageBatches
    from distil_tl.training.distillation import Teaching


@dataclass
class StageTraining:
    """The training state of one stage, created when the stage begins.

    Attributes:
        inner: the network that is trained.
        network: the same, under DDP when there are several ranks.
        batches: of training and of the evaluations.
        images: index of the training images, to name them in messages.
        loss: of each image.
        micro: images of a micro-batch.
        accumulation: micro-batches of a step.
        total_steps: of the stage.
        trains_statistics: BatchNorm statistics are updated, and averaged over the ranks after each step.
        first_bad_step: of the stage, on the device; infinite if there is none. The optimizer skips steps from it on.
        recent: (step of the stage, image indices) of the last micro-batches, to name those of a bad step.
        meter: training metrics of the current epoch.
        part_size: how many images of a micro-batch go through the network at once.
        val_part_size: the same in evaluation.
        cuda_graphs: the compiled network is replayed as CUDA graphs.
        weights: that the stage keeps besides those that it trains.
        statistics: those of the beginning of the current step, where they train.
        outputs: logits, targets, losses and validity of the current step, for the meter.
        teaching: None where the stage learns from the labels alone.
        reducing: the ranks are reducing gradients, or the weights change: this rank can't repeat the step alone.
    """

    stage: Stage
    inner: Network
    network: nn.Module
    batches: StageBatches
    images: Index
    loss: Loss
    accumulation: int
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    total_steps: int
    trains_statistics: bool
    first_bad_step: Tensor
    recent: collections.deque[tuple[int, Tensor]]
    meter: Meter = field(repr=False)
    micro: int = 1
    part_size: PartSize = field(default_factory=lambda: PartSize("training", "training"))
    val_part_size: PartSize = field(default_factory=lambda: PartSize("evaluation", "the evaluation"))
    statistics: SavedStatistics = field(default_factory=lambda: SavedStatistics([]))
    outputs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    teaching: Teaching | None = None
    reducing: bool = False
    cuda_graphs: bool = False
    weights: StageWeights = field(default_factory=StageWeights)

    @property
    def sampler(self) -> TrainSampler:
        return self.batches.sampler

    def steps_left(self, position: Position) -> range:
        """Steps of the stage that its current epoch has left, from `position` on."""
        first = position.epoch * self.sampler.steps_per_epoch
        done = position.consumed // self.sampler.global_batch_size
        return range(first + done, first + self.sampler.steps_per_epoch)

    def next_batch(self) -> Batch:
        """The next micro-batch. The time until it is there counts as waiting.

        Raises:
            UserError: this machine has too little memory to load it, which a smaller part of it would not help.
        """
        began = time.monotonic()
        try:
            batch = self.batches.next()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not is_out_of_memory(error):
                raise
            raise UserError(
                "this machine has too little memory to load images: use fewer data.workers, a smaller "
                f"data.prefetch_mib, or request more memory. {str(error).partition(chr(10))[0]}",
                one_rank=True,
            ) from error
        self.meter.waited += time.monotonic() - began
        return batch

    def begin_step(self) -> None:
        self.reducing = False
        self.statistics.save()

    def parts(self, batch: Batch) -> list[Batch]:
        """The parts of a micro-batch that go through the network one after another, with their images mixed."""
        parts = self.part_size.split(mix(batch, self.stage.mixing))
        if len(parts) > 1:
            self.stop_cuda_graphs()
        return parts

    def stop_cuda_graphs(self) -> None:
        """Compile the network without CUDA graphs from now on: they keep gradients only until the next pass.

        https://github.com/pytorch/pytorch/issues/169545
        """
        if self.cuda_graphs:
            self.cuda_graphs = False
            logger.info("stage %s needs several passes a step, so it runs without CUDA graphs", self.stage.name)
            compile_network(self.inner, self.stage, cuda_graphs=False)

    def recover(self) -> None:
        """Undo the forward and backward passes of the current step, and halve the parts of its micro-batches.

        Raises:
            UserError: the parts can't be smaller.
            RestartError: the ranks are reducing gradients or the weights change, so the step can't be repeated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.outputs.clear()
        self.statistics.restore()
        self.part_size.halve(self.micro)
        if self.reducing:
            raise RestartError(
                f"out of memory in {self.part_size.what}, where the step can't be repeated: the run starts again from "
                f"its last checkpoint, with at most {self.part_size.images} images at once on each rank",
                restart_settings(self.stage.name, self.part_size),
            )

    def taught(self, part: Batch, step: int) -> Tensor | None:
        """The teacher's logits for a part of a micro-batch; None without a teacher."""
        return None if self.teaching is None else self.teaching.logits(part, step // self.sampler.steps_per_epoch)

    def losses(self, logits: Tensor, taught: Tensor | None, part: Batch) -> Tensor:
        """The loss of each image of a part, [N], of the student's logits and the teacher's."""
        losses = self.loss(logits, part.targets, part.indices, part.partners)
        if self.teaching is None or taught is None:
            return losses
        return self.teaching.blend(losses, logits, taught, part, self.loss)

    def add_output(self, logits: Tensor, part: Batch, losses: Tensor) -> None:
        """Keep the output of a part for the meter, until the step is complete."""
        if self.cuda_graphs:  # they write each output to the same memory
            logits, losses = logits.clone(), losses.clone()
        self.outputs.append((logits, dominant(part.targets, part.partners), losses, part.valid))

    def end_step(self) -> None:
        """Count the predictions of the step."""
        for output in self.outputs:
            self.meter.update(*output)
        self.outputs.clear()

    def moment(self, position: Position) -> Moment:
        return Moment(self.stage.name, position.epoch, current_lr(self.optimizer))

    def state(self) -> dict[str, Any]:
        own = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {**own, **self.weights.state()}

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
        self.weights.load_state(state)


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
    training.reducing = True  # if memory runs out, weights may be changed in part: only a checkpoint has good ones
    until_memory_suffices(lambda: _clip_and_step(training, loss, step), training.recover)


def _clip_and_step(training: StageTraining, loss: Tensor, step: int) -> None:
    optimizer, scaler = training.optimizer, training.scaler
    scaler.unscale_(optimizer)
    norm = clip_gradients(optimizer, training.stage.optim.clip_norm)
    # In fp16 gradients overflow now and then by design, and the scaler skips the step; the loss must not.
    healthy = (loss if scaler.is_enabled() else norm).isfinite()
    bad = training.first_bad_step
    bad.copy_(torch.where(healthy, bad, bad.clamp(max=step)))
    if scaler.is_enabled():
        for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found.copy_(torch.maximum(found, bad.isfinite().to(found.device, found.dtype)))
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
    """Read from the device whether a loss or gradient was not finite since the last call. A collective.

    The ranks also agree on the size of parts, which may be smaller on one that ran out of memory.

    Raises:
        NonFiniteError: on all ranks alike, naming the first such step and its images.
    """
    first_bad, part_size = max_of_each_over_ranks(info, [-float(training.first_bad_step), -training.part_size.limit])
    training.part_size.adopt(-part_size)
    bad = -first_bad
    if bad == float("inf"):
        return
    index, stage = training.images, training.stage.name
    bad_images = [i for step, images in training.recent if step == bad for i in images.tolist()]
    mine = [printable(index.relative_path(i)) for i in dict.fromkeys(bad_images)]
    names = [name for part in gather_objects(info, mine) for name in part]
    shown = ", ".join(names[:64]) + (f" and {len(names) - 64} more" if len(names) > 64 else "")
    raise NonFiniteError(
        f"the loss or its gradient is not finite in step {int(bad) + 1} of stage {stage}; the last checkpoint "
        f"is kept. Try a lower stages.{stage}.lr, a longer optim.warmup, or "
        f"precision=fp32. The images of that batch, below {index.root}: {shown}"
    )
