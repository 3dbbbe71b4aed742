"""What `distil-tl select` tries, with its checks; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from distil_tl.data.augmentation import Augment
from distil_tl.data.config import CROP_MODES
from distil_tl.models.names import READOUTS
from distil_tl.training.auto_rules import auto_layer_decay, auto_lr
from distil_tl.training.config import SearchConfig, StageConfig
from distil_tl.training.heads.config import FITTED_HEADS, LINEAR_FITS
from distil_tl.utils.auto import AUTO
from distil_tl.utils.errors import did_you_mean

# Backbones by cost: up to 1, 8 and 50 billion multiply-adds for an image of their own size, with few exceptions.
LISTS = {
    "small": (
        "timm/tf_efficientnet_lite0", "timm/tf_efficientnet_lite1", "timm/tf_efficientnet_lite2",
        "timm/mobilenetv4_conv_small", "timm/mobilenetv4_conv_medium", "timm/mobilenetv3_large_100",
        "timm/efficientnet_b0", "timm/efficientvit_b0", "timm/efficientvit_b1", "timm/convnextv2_atto",
        "timm/regnety_008", "timm/vit_tiny_patch16_224", "resnet18",
    ),
    "medium": (
        "timm/vit_small_patch14_dinov2", "timm/vit_small_patch16_dinov3", "timm/convnext_tiny.dinov3_lvd1689m",
        "timm/convnextv2_nano", "timm/convnextv2_tiny", "timm/tf_efficientnetv2_s", "timm/caformer_s18",
        "timm/hiera_tiny_224", "timm/eva02_small_patch14_224", "timm/mobilenetv4_hybrid_medium",
        "timm/swin_tiny_patch4_window7_224", "timm/resnet50", "resnet50",
    ),
    "large": (
        "timm/vit_base_patch14_dinov2", "timm/vit_base_patch16_dinov3", "timm/convnext_base.dinov3_lvd1689m",
        "timm/vit_base_patch16_siglip_224", "timm/vit_base_patch16_clip_224", "timm/eva02_base_patch14_448",
        "timm/convnextv2_base", "timm/caformer_b36", "timm/hiera_base_224", "vit_b_16",
    ),
    "phone": (
        "timm/tf_efficientnet_lite0", "timm/tf_efficientnet_lite1", "timm/tf_efficientnet_lite2",
        "timm/tf_efficientnet_lite3", "timm/tf_efficientnet_lite4", "timm/mobilenetv4_conv_small",
        "timm/mobilenetv4_conv_medium", "timm/mobilenetv3_large_100", "mobilenet_v2", "mobilenet_v3_small",
    ),
}  # fmt: skip

# The head of a head search, then linear layers that are fitted, then heads that are no linear layer.
HEADS = ("linear", *LINEAR_FITS, "cosine", "knn", "mlp")
ALL = "all"  # heads or read-outs
STARTABLE = ("linear", *FITTED_HEADS)  # with which a run can begin: knn holds all training features
HEAD_EPOCHS = 20
HEAD_LR = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 1e-1)
HEAD_WEIGHT_DECAY = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass
class GridConfig:
    """The rows of the grid. A single value stands for a list of one."""

    candidates: Any = "small"  # backbones: names, patterns as in [timm/*lite*], or small | medium | large | phone
    sizes: Any = field(default_factory=list)  # image sizes in pixels, as in [128,224]; []: that of each backbone
    keep: Any = None  # of a long list: search only so many backbones, those of the highest LogME; null: all
    crops: Any = field(default_factory=list)  # of data.crop_mode, as in [weights,squash]; []: the configured one
    readouts: Any = field(default_factory=list)  # of model.readout, as in [pooled,last2]; all; []: the configured one
    heads: Any = "linear"  # linear | logistic | ridge | lda | prototypes | cosine | knn | mlp, a list of these, or all

    def __post_init__(self) -> None:
        self.candidates, self.sizes, self.crops = (_list(value) for value in (self.candidates, self.sizes, self.crops))
        self.sizes = [int(size) if isinstance(size, str) and size.isdecimal() else size for size in self.sizes]
        self.readouts = list(READOUTS) if _list(self.readouts) == [ALL] else _list(self.readouts)
        self.heads = list(HEADS) if _list(self.heads) == [ALL] else _list(self.heads)

    def problems(self) -> Iterator[str]:
        """Messages for all invalid values, other than names of backbones."""
        if not self.candidates:
            yield f"candidates is empty; give names of backbones, patterns, or one of {', '.join(LISTS)}"
        for name in self.candidates:
            if not isinstance(name, str) or not name:
                yield f"candidates has {name!r}; give names of backbones, as in model.name"
        if self.keep is not None and (type(self.keep) is not int or self.keep < 1):
            yield f"keep={self.keep}: give the number of backbones to search, as in keep=5, or null for all"
        for size in self.sizes:
            if type(size) is not int or size < 8:
                yield f"sizes has {size!r}; give whole numbers of at least 8 pixels, as in sizes=[128,224]"
        for crop in self.crops:
            if crop not in CROP_MODES:
                hint = did_you_mean(str(crop), CROP_MODES) or f"; choose of {', '.join(CROP_MODES)}"
                yield f"crops has {crop!r}{hint}"
        for readout in self.readouts:
            if readout not in READOUTS:
                hint = did_you_mean(str(readout), READOUTS) or f"; choose of {', '.join(READOUTS)}, or all alone"
                yield f"readouts has {readout!r}{hint}"
        if not self.heads:
            yield f"heads is empty; choose of {', '.join(HEADS)}, or all"
        for head in self.heads:
            if head not in HEADS:
                hint = did_you_mean(str(head), HEADS) or f"; choose of {', '.join(HEADS)}, or all alone"
                yield f"heads has {head!r}{hint}"


def _list(value: Any) -> list[Any]:
    """A list without repetitions, of a list, a single value, or text with commas."""
    if isinstance(value, str):
        value = value.split(",")
    values = value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(each.strip() if isinstance(each, str) else each for each in values))


def read_budget(text: str) -> float:
    """Seconds of a time such as 90s, 10m or 1.5h. Raises ValueError for other texts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is no time; write it with its unit, as in 90s, 10m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


def trains_head(stage: StageConfig) -> bool:
    """Whether a stage trains the head alone."""
    return stage.epochs != 0 and stage.trains_head


def head_stage(stages: dict[str, StageConfig], augment: Augment = "none") -> tuple[str, StageConfig]:
    """The stage whose heads are compared, with its name: the first one if it trains the head alone, else a new one.

    It trains on features, with a grid of settings if it has none.

    Args:
        augment: of its views, if the stage names no augmentation.
    """
    name, first = next(iter(stages.items()))
    if not trains_head(first):
        name = "head" if "head" not in stages else "selected_head"
        first = StageConfig(unfreeze="head", epochs=HEAD_EPOCHS)
    search = first.search if first.search.wanted else SearchConfig(list(HEAD_LR), list(HEAD_WEIGHT_DECAY))
    augment = "none" if first.views is None else first.augment or ("light" if augment == AUTO else augment)
    lr = auto_lr(None, 0) if first.lr == AUTO else first.lr  # as for a first stage that is trained
    decay = auto_layer_decay(None, 0) if first.layer_decay == AUTO else first.layer_decay
    return name, replace(
        first, features="on", augment=augment, image_size=None, lr=lr, layer_decay=decay, search=search, head="linear"
    )
