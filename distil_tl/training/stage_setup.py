"""How a stage gets ready: where its frozen part ends, what it computes in, and whether it trains on features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.models.graph.equivalence import undisturbed
from distil_tl.models.graph.frozen_prefix import CannotCutError, CutNetwork, cut_frozen_prefix
from distil_tl.run import Job
from distil_tl.rundir.directory import StageRecord
from distil_tl.training.features import BATCH_CUDA, Features, open_features
from distil_tl.training.network import FeatureNetwork, Network, Prefix, SplitNetwork, any_images
from distil_tl.training.precision import Compute, choose, ways_to_compute
from distil_tl.training.stage import StageConfig, apply_stage, wants_features

TRIAL = 8  # images of a trial step on a CPU, where more change nothing


@dataclass(frozen=True)
class Ready:
    """What a stage trains, and on what: features, or where there are none, images."""

    network: Network
    features: Features | None
    example: Tensor  # two of what it trains on, of the right size and type, and of no meaning


def get_ready(job: Job, name: str, stage: StageConfig, micro: int) -> Ready:
    """Freeze what a stage freezes, and settle how the rest is trained; as before, when the run goes on within it.

    Args:
        micro: images that a rank trains on at once.

    Raises:
        UserError: the stage wants features and can't have them.
        StopAgreedError: on all ranks alike.
    """
    info, config, network = job.info, job.config, job.network
    apply_stage(job.model, stage)
    image_size = job.image_size(stage)
    record = job.state.stages.setdefault(name, StageRecord())
    ways = ways_to_compute(config.precision, job.model.module, info.device)
    network.use(Compute(None, ways[0].channels_last))
    images = any_images(3, image_size, info.device)
    parts: CutNetwork | None = None
    prefix: Prefix | str
    try:
        parts = cut_frozen_prefix(job.model.module, network.normalize(images))
        prefix = Prefix(network, parts, ways[0])
    except CannotCutError as reason:
        prefix = str(reason)
    if isinstance(prefix, Prefix):
        prefix.use(_for_prefix(job, name, stage, record, ways, prefix))
        record.prefix_precision = str(prefix.compute)
    features = open_features(
        info, config.data, job.model, prefix, job.splits, name, stage, record,
        image_size=image_size, seed=config.seed, bad_images=job.bad_images, agreement=job.agreement,
    )  # fmt: skip
    trained: Network = network
    if parts is not None and isinstance(prefix, Prefix):
        rest = FeatureNetwork(parts, ways[0])
        trained = rest if features is not None else SplitNetwork(prefix, rest)
    else:
        network.fold(image_size, trains=True, wanted=record.folded is not False)
        record.folded = network.folded is not None
    compute = _for_training(job, name, stage, record, ways, trained, features, micro)
    record.precision = str(compute)
    network.use(compute)  # all of it: what the suffix shares, and what a final evaluation runs
    trained.use(compute)
    if isinstance(prefix, Prefix):
        prefix.use(prefix.compute)
    if config.compile != "none":
        _compile(config.compile, trained)
    example = images[:2] if features is None else features.train.example(2).to(info.device)
    return Ready(trained, features, example)


def _compile(what: str, network: Network) -> None:
    """Compile in place, for the sizes that come; the first batch of each size takes its time."""
    if what == "all":
        network.compile(dynamic=False)
    elif isinstance(network, SplitNetwork):
        network.prefix.compile(dynamic=False)


def _epochs_left(job: Job, name: str, stage: StageConfig) -> int:
    return stage.epochs - job.position(name).epoch


def _for_prefix(
    job: Job, name: str, stage: StageConfig, record: StageRecord, ways: list[Compute], prefix: Prefix
) -> Compute:
    if record.prefix_precision is not None:
        return Compute.parse(record.prefix_precision)
    size = job.image_size(stage)
    at_once = min(BATCH_CUDA, job.config.data.max_local_batch_size or BATCH_CUDA)
    images = any_images(at_once if job.info.device.type == "cuda" else TRIAL, size, job.info.device)
    count, val = len(job.splits.train), len(job.splits.val)
    augment = stage.augment or job.config.data.augment
    cached = wants_features(stage, augment)
    times = stage.views or 1 if cached else _epochs_left(job, name, stage)

    def step(way: Compute) -> None:
        prefix.use(way)
        prefix(images)

    return choose(
        job.info, ways, step,
        what=f"the frozen part of stage {name}",
        images=len(images),
        to_come=(times * count + val) // job.info.world_size,
        depends_on=_depends_on(job, stage, "inference"),
    )  # fmt: skip


def _for_training(
    job: Job,
    name: str,
    stage: StageConfig,
    record: StageRecord,
    ways: list[Compute],
    network: Network,
    features: Features | None,
    micro: int,
) -> Compute:
    if record.precision is not None:
        return Compute.parse(record.precision)
    device = job.info.device
    if device.type != "cuda":
        micro = min(micro, TRIAL)
    if features is None:
        inputs = any_images(micro, job.image_size(stage), device)
    else:
        inputs = features.train.example(micro).to(device)
        if inputs.ndim == 2:
            return ways[0]  # a layer or two, whose time does not matter
    targets = torch.zeros(len(inputs), dtype=torch.int64, device=device)

    def step(way: Compute) -> None:
        network.use(way)
        with undisturbed(job.model.module, device):
            F.cross_entropy(network(inputs), targets).backward()  # type: ignore[no-untyped-call]
        for parameter in network.parameters():
            parameter.grad = None

    return choose(
        job.info, ways, step,
        what=f"the training of stage {name}",
        images=len(inputs),
        to_come=_epochs_left(job, name, stage) * len(job.splits.train) // job.info.world_size,
        depends_on=_depends_on(job, stage, "training" if features is None else "training on features"),
    )  # fmt: skip


def _depends_on(job: Job, stage: StageConfig, direction: str) -> dict[str, object]:
    unfreeze = stage.unfreeze if isinstance(stage.unfreeze, (int, str)) else list(stage.unfreeze)
    return {
        "direction": direction,
        "model": job.config.model.name,
        "image_size": job.image_size(stage),
        "unfreeze": unfreeze,
        "batch_norm": stage.batch_norm,
    }
