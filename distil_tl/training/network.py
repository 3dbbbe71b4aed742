"""The networks that stages train: a batch as the loader yields it to logits, in a given precision and memory format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distil_tl.models.fitted_heads import FittedHead
from distil_tl.models.graph.fold_batchnorm import CannotFoldError, ConvNorm, fold_batchnorm
from distil_tl.models.graph.frozen_prefix import CannotCutError, CutNetwork, cut_frozen_prefix
from distil_tl.models.names import BUILT_HEADS
from distil_tl.models.preprocess import Normalize
from distil_tl.rundir.state import StageRecord
from distil_tl.training.config import StageConfig
from distil_tl.training.precision import Compute, use_benchmark
from distil_tl.training.stage import Stage, apply_stage
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel


def dummy_images(count: int, size: int, device: torch.device) -> Tensor:
    """Random images uint8 [count, 3, size, size], always the same, to try a network on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator).to(device)


def set_layout(module: nn.Module, compute: Compute) -> None:
    """Lay out the parameters of `module` as `compute` says, in place: they stay the same objects."""
    module.to(memory_format=compute.memory_format)
    device = next(module.parameters()).device
    # Below float32 the gradients of BatchNorm scales would be computed from rounded sums.
    folds = compute.dtype is None and folding_pays(device)
    for part in module.modules():
        if isinstance(part, ConvNorm):
            part.folds = folds


def folding_pays(device: torch.device) -> bool:
    """Whether folding BatchNorm at each call is faster: measured on CPUs only."""
    return device.type == "cpu"


def try_to_fold(model: TransferModel, image_size: int, device: torch.device, *, trains: bool) -> nn.Module | None:
    """The model with BatchNorm folded into convolutions at each call; None if that is not faster or not possible.

    Args:
        image_size: pixels; the folded model takes no other size.
        trains: whether it will run in training mode too.
    """
    module = model.module
    if not folding_pays(device) or not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return None
    images = Normalize(model.preprocess).to(device)(dummy_images(3, image_size, device))
    try:
        return fold_batchnorm(module, images, trains=trains)
    except CannotFoldError as error:
        logger.info("BatchNorm is not folded into convolutions: %s", error)
        return None


class Network(nn.Module):
    """A batch as the loader yields it to float32 logits [N, C], in the precision and memory format of `compute`.

    Attributes:
        is_compiled: it, or its frozen part, is compiled: each new number of images takes long once.
    """

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.is_compiled = False


class ImageNetwork(Network):
    """A whole model with its normalisation, on uint8 images [N, 3, S, S].

    Args:
        folded: the same model with BatchNorm folded, used for images of `folded_size` pixels.
    """

    def __init__(
        self,
        model: TransferModel,
        compute: Compute,
        device: torch.device,
        folded: nn.Module | None = None,
        folded_size: int = 0,
    ) -> None:
        super().__init__(compute)
        self.normalize = Normalize(model.preprocess)
        self.module = model.module  # first, as DDP names each parameter by the first module that has it
        self.folded = folded
        self.folded_size = folded_size
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        folded = self.folded if images.shape[-1] == self.folded_size else None
        images = self.normalize(images).contiguous(memory_format=self.compute.memory_format)
        with self.compute.autocast(images.device):
            logits: Tensor = (self.module if folded is None else folded)(images)
        return logits.float()


def evaluation_network(
    model: TransferModel, compute: Compute, device: torch.device, image_size: int, *, fold: bool = True
) -> ImageNetwork:
    """The whole model for evaluation on images of `image_size` pixels, with BatchNorm folded where that pays."""
    model.module.to(device)
    set_layout(model.module, compute)
    folded = try_to_fold(model, image_size, device, trains=False) if fold else None
    network = ImageNetwork(model, compute, device, folded, image_size)
    lay_out(network)
    use_benchmark(compute)
    return network


class Prefix(nn.Module):
    """The frozen part of a model: uint8 images [N, 3, S, S] to features [N, ...], without gradients.

    Attributes:
        packed: as in `CutNetwork`.
    """

    def __init__(self, model: TransferModel, cut: CutNetwork, compute: Compute, device: torch.device) -> None:
        super().__init__()
        self.compute = compute
        self.normalize = Normalize(model.preprocess)
        self.prefix = cut.prefix
        self.packed = cut.packed
        self.to(device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = self.normalize(images).contiguous(memory_format=self.compute.memory_format)
        with self.compute.autocast(images.device):
            features: Tensor = self.prefix(images)
        return features


class FeatureNetwork(Network):
    """The trained part of a model, on features [N, ...]: everything from its first trained layer on."""

    def __init__(self, cut: CutNetwork, compute: Compute) -> None:
        super().__init__(compute)
        self.suffix = cut.suffix

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            features = features.contiguous(memory_format=self.compute.memory_format)
        if self.compute.dtype is None:
            features = features.float()
        with self.compute.autocast(features.device):
            logits: Tensor = self.suffix(features)
        return logits.float()


class SplitNetwork(Network):
    """A model on uint8 images whose frozen part runs without gradients, with BatchNorm folded once."""

    def __init__(self, prefix: Prefix, rest: FeatureNetwork) -> None:
        super().__init__(rest.compute)
        self.prefix = prefix
        self.rest = rest

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.rest(self.prefix(images))
        return logits


def dropout_and_head(network: Network, stage: Stage) -> tuple[nn.Sequential, nn.Linear | FittedHead]:
    """The layers before the head, such as a dropout, and the head.

    Raises:
        UserError: the stage trains something other than a single head of the kind that it searches or fits.
    """
    layers = network.suffix if isinstance(network, FeatureNetwork) else None
    kind = FittedHead if stage.config.head in BUILT_HEADS else nn.Linear
    if isinstance(layers, nn.Sequential) and not list(layers[:-1].parameters()) and isinstance(layers[-1], kind):
        return layers[:-1], layers[-1]
    what, other = ("head", "use head=linear") if stage.config.fits_head else ("search", "remove the search")
    raise UserError(
        f"stages.{stage.name}.{what}: the stage trains something other than a single linear layer on features; set "
        f"unfreeze=head, or {other} if the head of this model is not a linear layer"
    )


def lay_out(network: Network | Prefix) -> None:
    """Give the parameters of a network the memory format of its `compute`, in place; a frozen part has its own.

    Networks share parameters with their model, so the last call for a parameter counts.
    """
    if isinstance(network, SplitNetwork):
        lay_out(network.rest)
        lay_out(network.prefix)
    elif isinstance(network, Prefix):
        network.to(memory_format=network.compute.memory_format)  # it may have no parameters
    else:
        set_layout(network, network.compute)


def final_network(
    model: TransferModel,
    stage: StageConfig,
    compute: Compute,
    record: StageRecord,
    device: torch.device,
    image_size: int,
) -> Network:
    """The whole model for evaluation on images of `image_size` pixels, computed as while its stage trained.

    Where the frozen part of the stage was computed in another precision than the rest, it is here, too: otherwise the
    figures would be others than those by which the checkpoint was chosen.

    Args:
        stage, record: of the checkpoint.
        compute: precision and memory format of the trained part.
    """
    fold = record.folded is not False
    prefix_compute = None if record.prefix_precision is None else Compute.parse(record.prefix_precision)
    if prefix_compute is None or prefix_compute.dtype == compute.dtype:
        return evaluation_network(model, compute, device, image_size, fold=fold)
    apply_stage(model, stage)
    model.module.to(device)
    images = Normalize(model.preprocess).to(device)(dummy_images(3, image_size, device))
    try:
        cut = cut_frozen_prefix(model.module, images)
    except CannotCutError as error:
        logger.warning("evaluated in %s, not in %s as its frozen part was: %s", compute, prefix_compute, error)
        return evaluation_network(model, compute, device, image_size, fold=fold)
    network = SplitNetwork(Prefix(model, cut, prefix_compute, device), FeatureNetwork(cut, compute))
    lay_out(network)
    use_benchmark(compute)
    return network
