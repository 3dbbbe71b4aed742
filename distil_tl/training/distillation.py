"""Knowledge distillation (Hinton et al., 2015): a teacher's outputs as soft targets."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.data.feature_cache import FeatureDataset
from distil_tl.data.loader import Batch
from distil_tl.data.sampler import SampleKey
from distil_tl.data.source import ImageSource
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.checkpoint import weights_hash
from distil_tl.rundir.state import StageRecord
from distil_tl.training.config import DistillConfig
from distil_tl.training.feature_extraction import FeatureExtractor
from distil_tl.training.features import FeaturesUnavailableError
from distil_tl.training.losses import Loss
from distil_tl.training.network import Network
from distil_tl.training.stage import Stage
from distil_tl.utils.errors import UserError

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel


def soft_losses(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of each image at temperature T, [N], of logits [N, C] of the student and the teacher.

    The factor keeps the size of the gradient when the temperature changes.
    """
    student, teacher = (F.log_softmax(each / temperature, dim=1) for each in (logits, taught))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


class Teacher(nn.Module):
    """A trained model on the student's view of an image: uint8 [N, 3, S, S] to logits in the student's order, [N, C].

    Images of another size than its own are resized on the device. It is in evaluation mode, without gradients.

    Args:
        model: the teacher, whose `network` computes it with its own normalisation.
        image_size: of the teacher, in pixels.
        order: for each class of the student, its position among those of the teacher.
    """

    def __init__(self, model: TransferModel, network: Network, image_size: int, order: list[int]) -> None:
        super().__init__()
        self.model = model
        self.prefix = network.eval()
        self.compute = network.compute
        self.image_size = image_size
        self.order = order

    @property
    def digest(self) -> str:
        """Of everything that its outputs depend on, besides the images."""
        text = (weights_hash(self.model.module), str(self.compute), self.image_size, self.model.preprocess, self.order)
        return hashlib.sha256(repr(text).encode()).hexdigest()[:24]

    def train(self, mode: bool = True) -> Teacher:
        """Nothing: a teacher stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        logits: Tensor = self.prefix(images)
        return logits[:, self.order]


@dataclass(frozen=True)
class Teaching:
    """How a stage learns from its teacher.

    Attributes:
        cached: the teacher's outputs for each view of the training images; None where it computes them in each step.
    """

    teacher: Teacher
    config: DistillConfig
    cached: FeatureDataset | None = None

    def logits(self, part: Batch, epoch: int) -> Tensor:
        """The teacher's logits for images of a batch, which come in this epoch of the stage, [N, C]."""
        if self.cached is None:
            taught: Tensor = self.teacher(part.images)
            return taught
        found = self.cached.__getitems__([SampleKey(image, epoch, 0) for image in part.indices.tolist()]).images
        if part.targets.is_cuda:  # so that the copy does not wait for the device
            found = found.pin_memory()
        return found.to(part.targets.device, non_blocking=True).float()

    def blend(self, losses: Tensor, logits: Tensor, taught: Tensor, part: Batch, loss: Loss) -> Tensor:
        """The losses of a part [N], of which the teacher has its share. Classes and images keep their weights."""
        soft = soft_losses(logits, taught, self.config.temperature)
        weighted, partners = loss.weighted(soft, part.targets, part.indices), part.partners
        if partners is not None:  # of mixed images, the weights of both
            others = loss.weighted(soft, partners.targets, partners.indices)
            weighted = partners.shares * weighted + (1 - partners.shares) * others
        return self.config.alpha * weighted + (1 - self.config.alpha) * losses


def cache_teaching(
    info: DistInfo,
    stage: Stage,
    teaching: Teaching,
    source: ImageSource,
    record: StageRecord,
    agreement: Agreement,
) -> Teaching:
    """The same with the teacher's outputs from the cache, for a stage on features: it does not see the images.

    The views are those of the features, so the teacher sees what the student's frozen part saw. A collective.

    Raises:
        UserError: there is not enough disk space or memory for them.
        AllRanksStopError: on all ranks alike.
    """
    teacher, views = teaching.teacher, stage.config.views
    depends_on: dict[str, Any] = {"order": teacher.order, "view": source.preprocess.to_json()}
    extractor = FeatureExtractor(
        info, teacher.model, teacher, source, stage, record, agreement,
        limit_memory=False, depends_on={**depends_on, "size": teacher.image_size},
    )  # fmt: skip
    try:
        outputs = extractor.open("train", "none" if views is None else stage.augment, views or 1)
    except FeaturesUnavailableError as error:
        raise UserError(
            f"stages.{stage.name}.distill: the teacher's outputs can't be cached: {error}; use "
            f"stages.{stage.name}.features=off"
        ) from None
    return dataclasses.replace(teaching, cached=outputs)
