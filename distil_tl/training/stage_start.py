"""The beginning of a stage: loaders, optimizer, DDP, and a first pass that must fit into memory."""

from __future__ import annotations

import collections
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from distil_tl.data.loader import BatchPlan
from distil_tl.data.sampler import in_batches
from distil_tl.data.source import ImageSource
from distil_tl.data.stage_batches import StageBatches
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.graph.equivalence import preserve_state
from distil_tl.rundir.state import StageRecord
from distil_tl.training.interpolation import ALPHAS
from distil_tl.training.losses import training_loss
from distil_tl.training.memory import PartSize, SavedStatistics, training_part_size, until_memory_suffices
from distil_tl.training.metrics import Meter
from distil_tl.training.optim import build_optimizer
from distil_tl.training.stage import Stage
from distil_tl.training.stage_setup import StageSetup
from distil_tl.training.stage_weights import StageWeights
from distil_tl.training.step import StageTraining, trained_statistics

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel

# Frozen statistics do not change, and those that train are averaged after each step. Newer torch renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


def begin_stage(
    info: DistInfo,
    stage: Stage,
    model: TransferModel,
    setup: StageSetup,
    source: ImageSource,
    plan: BatchPlan,
    record: StageRecord,
    log_every: int,
) -> StageTraining:
    """Build the loaders and the optimizer, and wrap the network, for a stage whose freezing is applied.

    DDP registers the trainable parameters when it wraps a network, so each stage wraps its network again.

    Args:
        record: of the stage; sizes of parts are recorded in it when memory runs out.
        log_every: steps between two calls of `check_finite`, at most.
    """
    batches, images = build_loaders(stage, setup, source, plan), source.index("train")
    network = wrap_in_ddp(info, setup.network, stage.optim.compression)
    optimizer = build_optimizer(model, stage.config, stage.optim)
    optimizer.zero_grad(set_to_none=True)  # a trial that failed may have left gradients
    training = StageTraining(
        stage=stage,
        inner=setup.network,
        network=network,
        batches=batches,
        images=images,
        loss=training_loss(stage.optim, stage.balance, images.class_counts, info.device, images.weights),
        micro=plan.micro,
        accumulation=plan.accumulation,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(info.device.type, enabled=setup.network.compute.dtype == torch.float16),
        total_steps=stage.config.epochs * batches.sampler.steps_per_epoch,
        trains_statistics=stage.config.batch_norm == "train" and info.world_size > 1,
        first_bad_step=torch.full((), torch.inf, device=info.device),
        recent=collections.deque(maxlen=log_every * plan.accumulation),
        meter=Meter(info, len(images.classes)),
        part_size=training_part_size(stage, setup.network, record),
        val_part_size=PartSize("evaluation", f"the evaluation of stage {stage.name}", record.part_sizes),
        statistics=SavedStatistics(trained_statistics(network)),
        cuda_graphs=stage.uses_cuda_graphs,
        teaching=setup.teaching,
        weights=StageWeights.of(stage.config, model.module),
    )
    if stage.config.wise_ft:
        batches.more_evaluations = len(ALPHAS) - 1  # those of alpha 1 have been evaluated already
    if plan.accumulation > 1 or training.part_size.images is not None:
        training.stop_cuda_graphs()
    count = 2
    if info.device.type == "cuda":
        # Memory must suffice before the ranks reduce gradients: there, a step can't be repeated. Its size is that of
        # training, so that torch.compile compiles no other.
        count = fit_to_memory(info, training, setup, plan.micro)
    fix_bucket_order(info, network, optimizer, setup.dummy(count, info.device))
    return training


def build_loaders(stage: Stage, setup: StageSetup, source: ImageSource, plan: BatchPlan) -> StageBatches:
    """The loaders of a stage, of features or images. Nothing is loaded yet."""
    sampler = source.sampler(seed=stage.seed, stage=stage.name, epochs=stage.config.epochs)
    val_sampler = source.eval_batches("val")
    if setup.features is None:
        dataset = source.train_dataset(
            "train", stage.image_size, stage.augment, seed=stage.seed, stage=stage.name, mixing=stage.mixing
        )
        return StageBatches(
            source, sampler, source.train_loader(dataset, sampler, plan.micro),
            val_sampler, source.eval_loader("val", stage.image_size, val_sampler),
        )  # fmt: skip
    return StageBatches(
        source, sampler, source.feature_loader(setup.features.train, in_batches(sampler, plan.micro), plan.micro),
        val_sampler, source.feature_loader(setup.features.val, val_sampler, val_sampler.batch_size),
    )  # fmt: skip


def fit_to_memory(info: DistInfo, training: StageTraining, setup: StageSetup, images: int) -> int:
    """Try a forward and backward pass of `images` dummy images, with fewer as long as memory runs out. A collective.

    Returns the number of images that all ranks can pass at once.

    Raises:
        UserError: there is too little memory for the smallest part.
    """

    # AdamW creates its moments in the first step. SGD has them already.
    moments = 2 if isinstance(training.optimizer, torch.optim.AdamW) else 0

    def attempt() -> None:
        parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
        held = [torch.empty_like(p) for p in parameters for _ in range(moments)]
        count = min(images, training.part_size.images or images)
        if setup.teaching is not None and setup.features is None:
            setup.teaching.teacher(setup.dummy(count, info.device))
        with preserve_state(training.inner, info.device):
            training.inner(setup.dummy(count, info.device)).sum().backward()
        del held

    until_memory_suffices(attempt, training.recover)
    training.optimizer.zero_grad(set_to_none=True)
    training.part_size.agree(info)
    return min(images, training.part_size.images or images)


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
