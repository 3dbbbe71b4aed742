"""Setting up a stage: freeze, find where the frozen part ends, choose precisions, and open features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.data.source import ImageSource
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.graph.equivalence import preserve_state
from distil_tl.models.graph.frozen_prefix import CannotCutError, CutNetwork, cut_frozen_prefix
from distil_tl.models.preprocess import Normalize
from distil_tl.rundir.state import StageRecord
from distil_tl.training.autotune import choose
from distil_tl.training.compiling import compile_network
from distil_tl.training.feature_extraction import BATCH_CUDA, FeatureExtractor
from distil_tl.training.features import Features, FeaturesUnavailableError, refuse_without_features
from distil_tl.training.network import (
    FeatureNetwork,
    ImageNetwork,
    Network,
    Prefix,
    SplitNetwork,
    dummy_images,
    lay_out,
    set_layout,
    try_to_fold,
)
from distil_tl.training.precision import Compute, candidates, use_benchmark
from distil_tl.training.stage import Stage, apply_stage

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel
    from distil_tl.training.distillation import Teaching

TRIAL_IMAGES = 8  # in a trial step on a CPU, where more make no difference


@dataclass(frozen=True)
class StageSetup:
    """What a stage trains.

    Attributes:
        network: takes what the loader yields: features, or images where there are none.
        features: None where the stage trains on images.
        image_size: pixels.
        blends: images come as float32, blended by mixup; torch.compile compiles for that.
        teaching: None where the stage learns from the labels alone.
        prefix: the frozen part, where there is one.
    """

    network: Network
    features: Features | None
    image_size: int
    blends: bool = False
    teaching: Teaching | None = None
    prefix: Prefix | None = None

    def dummy(self, count: int, device: torch.device) -> Tensor:
        """A batch of `count`, of the right size and type, on the device."""
        if self.features is not None:
            return self.features.train.example(count).to(device)
        images = dummy_images(count, self.image_size, device)
        return images.float() if self.blends else images


@dataclass(frozen=True)
class _Parts:
    """The model of a stage: cut where its frozen part ends, or whole, with BatchNorm folded where that pays."""

    model: TransferModel
    device: torch.device
    image_size: int
    cut: CutNetwork | None
    prefix: Prefix | None
    folded: nn.Module | None
    on_features: bool

    def network(self, compute: Compute) -> Network:
        """What the stage trains."""
        if self.cut is None or self.prefix is None:
            return ImageNetwork(self.model, compute, self.device, self.folded, self.image_size)
        rest = FeatureNetwork(self.cut, compute)
        return rest if self.on_features else SplitNetwork(self.prefix, rest)


def set_up_stage(
    info: DistInfo,
    stage: Stage,
    model: TransferModel,
    source: ImageSource,
    record: StageRecord,
    micro_batch: int,
    agreement: Agreement,
) -> StageSetup:
    """Freeze what a stage freezes, and prepare how the rest is trained. A resumed stage is set up as before.

    Args:
        record: of the stage; what is chosen here is noted in it.
        micro_batch: images of one forward pass in training.

    Raises:
        UserError: the stage asks for features and can't have them, or an image can't be used.
        AllRanksStopError: on all ranks alike.
    """
    apply_stage(model, stage.config)
    options = candidates(stage.precision, model.module, info.device)
    set_layout(model.module, Compute(None, options[0].channels_last))
    cut = prefix = folded = features = None
    # A stage that began without features stays without them.
    wants_features = stage.wants_features and (record.cached or not record.has_begun)
    try:
        images = Normalize(model.preprocess).to(info.device)(dummy_images(3, stage.image_size, info.device))
        cut = cut_frozen_prefix(model.module, images)
    except CannotCutError as error:
        if wants_features:
            refuse_without_features(stage, str(error))
    if cut is not None:
        compute = _prefix_compute(info, stage, model, cut, source, record, options)
        prefix = Prefix(model, cut, compute, info.device)
        lay_out(prefix)
        record.prefix_precision = str(compute)
        use_benchmark(compute)  # a trial leaves the setting of its last candidate
        if wants_features:
            features = _open_features(info, stage, model, prefix, source, record, agreement)
    else:
        folded = try_to_fold(model, stage.image_size, info.device, trains=True) if record.folded is not False else None
        record.folded = folded is not None
    parts = _Parts(model, info.device, stage.image_size, cut, prefix, folded, features is not None)
    compute = _trained_compute(info, stage, parts, features, record, options, micro_batch, len(source.index("train")))
    record.precision = str(compute)
    network = parts.network(compute)
    set_layout(model.module, compute)
    lay_out(network)
    use_benchmark(compute)
    if stage.compile != "none":
        compile_network(network, stage, cuda_graphs=True)
    return StageSetup(network, features, stage.image_size, blends=stage.config.mixup > 0, prefix=prefix)


def _open_features(
    info: DistInfo,
    stage: Stage,
    model: TransferModel,
    prefix: Prefix,
    source: ImageSource,
    record: StageRecord,
    agreement: Agreement,
) -> Features | None:
    """Features for the stage; None where they are not available and the stage can train on images."""
    limit_memory = stage.config.features == "auto" and not record.cached
    extractor = FeatureExtractor(info, model, prefix, source, stage, record, agreement, limit_memory=limit_memory)
    try:
        features = extractor.open_all()
    except FeaturesUnavailableError as error:
        refuse_without_features(stage, str(error))
        return None
    record.cached = True
    return features


def _prefix_compute(
    info: DistInfo,
    stage: Stage,
    model: TransferModel,
    cut: CutNetwork,
    source: ImageSource,
    record: StageRecord,
    options: list[Compute],
) -> Compute:
    """Precision and memory format of the frozen part: recorded, or chosen by a trial."""
    if record.prefix_precision is not None:
        return Compute.parse(record.prefix_precision)
    batch = TRIAL_IMAGES
    if info.device.type == "cuda":
        batch = min(BATCH_CUDA, source.config.max_local_batch_size or BATCH_CUDA)
    images = dummy_images(batch, stage.image_size, info.device)
    passes = (stage.config.views or 1) if stage.wants_features else stage.config.epochs

    def step(compute: Compute, count: int) -> None:
        prefix = Prefix(model, cut, compute, info.device)
        lay_out(prefix)
        use_benchmark(compute)
        prefix(images[:count])

    return choose(
        info, options, step,
        what=f"the frozen part of stage {stage.name}",
        images=len(images),
        remaining=(passes * len(source.index("train")) + len(source.index("val"))) // info.world_size,
        depends_on=_depends_on(stage, model, "inference"),
    )  # fmt: skip


def _trained_compute(
    info: DistInfo,
    stage: Stage,
    parts: _Parts,
    features: Features | None,
    record: StageRecord,
    options: list[Compute],
    micro_batch: int,
    images_per_epoch: int,
) -> Compute:
    """Precision and memory format of the trained part: recorded, or chosen by a trial."""
    if record.precision is not None:
        return Compute.parse(record.precision)
    if info.device.type != "cuda":
        micro_batch = min(micro_batch, TRIAL_IMAGES)
    if features is None:
        inputs = dummy_images(micro_batch, stage.image_size, info.device)
    else:
        inputs = features.train.example(micro_batch).to(info.device)
        if inputs.ndim == 2 and not (parts.cut is not None and parts.cut.packed):
            return options[0]  # a layer or two, which take little time
    targets = torch.zeros(len(inputs), dtype=torch.int64, device=info.device)

    def step(compute: Compute, count: int) -> None:
        network = parts.network(compute)
        lay_out(network)
        use_benchmark(compute)
        try:
            with preserve_state(parts.model.module, info.device):
                F.cross_entropy(network(inputs[:count]), targets[:count]).backward()  # type: ignore[no-untyped-call]
        finally:
            for parameter in network.parameters():
                parameter.grad = None

    return choose(
        info, options, step,
        what=f"the training of stage {stage.name}",
        images=len(inputs),
        remaining=stage.config.epochs * images_per_epoch // info.world_size,
        depends_on=_depends_on(stage, parts.model, "training" if features is None else "training on features"),
    )  # fmt: skip


def _depends_on(stage: Stage, model: TransferModel, direction: str) -> dict[str, object]:
    unfreeze = stage.config.unfreeze if isinstance(stage.config.unfreeze, (int, str)) else list(stage.config.unfreeze)
    return {
        "direction": direction,
        "model": model.name,
        "image_size": stage.image_size,
        "unfreeze": unfreeze,
        "batch_norm": stage.config.batch_norm,
    }
