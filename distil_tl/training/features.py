"""Features: the output of the frozen part of a network, computed once and trained on instead of images.

Before a stage's first trained layer everything is a fixed function of the image's view, so it is read from a cache
instead of computed in each epoch. The order of the images is the same as without features.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from distil_tl.data.augmentation import Augment
from distil_tl.data.feature_cache import FeatureDataset
from distil_tl.data.index import Index
from distil_tl.data.pillow import Intensity
from distil_tl.models.names import OWN_SEPARATOR
from distil_tl.models.own_models import source_digest
from distil_tl.rundir.checkpoint import weights_hash
from distil_tl.training.network import Prefix
from distil_tl.training.stage import Stage
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel
    from distil_tl.training.distillation import Teacher

FORMAT = 5  # of the cache; increased when features are computed differently


class FeaturesUnavailableError(Exception):
    """A stage can't train on features, on all ranks alike. The text is the reason."""


class FeaturesNeededError(UserError):
    """A stage can't train on features and is configured to do so.

    Attributes:
        reason: without the key that asks for them.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Features:
    """The training and validation images of a stage, as features."""

    train: FeatureDataset
    val: FeatureDataset


@dataclass(frozen=True)
class Views:
    """Which views of the images the features are computed of.

    Attributes:
        image_size: pixels.
        augment: as `data.augment`.
        hflip: whether augmentation may mirror an image.
        seed: of the augmentation.
        count: views of each image.
        pixels: by format, the digests of a decoder that gives unusual pixels.
        intensity: as `data.intensity`.
        teacher: what the outputs of a teacher depend on besides; empty for features.
    """

    image_size: int
    augment: Augment
    hflip: bool
    seed: int
    count: int
    pixels: dict[str, str] = field(default_factory=dict)
    intensity: Intensity = "dtype"
    teacher: dict[str, Any] = field(default_factory=dict)


def cache_key(model: TransferModel, prefix: Prefix | Teacher, index: Index, views: Views) -> str:
    """A digest of everything that features depend on; the seed only where augmentation draws random numbers."""
    library = sys.modules[type(model.module).__module__.partition(".")[0]]
    augmented = views.augment != "none"
    depends = {
        "format": FORMAT,
        "weights": weights_hash(prefix.prefix),
        "code": getattr(prefix.prefix, "code", ""),
        "layers": re.sub(r" at 0x[0-9a-f]+", "", repr(prefix.prefix)),  # with paddings, activations, epsilons
        "architecture": [type(model.module).__qualname__, getattr(library, "__version__", "")],
        "images": [index.fingerprint, index.times],  # not their contents: a changed file has another time
        "image_size": views.image_size,
        "augment": views.augment,
        "hflip": views.hflip if augmented else None,
        "seed": views.seed if augmented else None,
        "views": views.count,
        "preprocess": model.preprocess.to_json(),
        "compute": str(prefix.compute),
        "device": next(model.module.parameters()).device.type,
        "torch": torch.__version__,
        **({"pixels": views.pixels} if views.pixels else {}),
        **({"intensity": views.intensity} if views.intensity != "dtype" else {}),
        **({"teacher": views.teacher} if views.teacher else {}),
        # The code of layers is not in the graph.
        **({"source": source_digest(model.module)} if OWN_SEPARATOR in model.name else {}),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def refuse_without_features(stage: Stage, reason: str) -> None:
    """Log why a stage does not use features.

    Raises:
        FeaturesNeededError: its configuration asks for them.
    """
    key, config = f"stages.{stage.name}", stage.config
    if config.search.wanted:
        raise FeaturesNeededError(f"{key}.search needs features: {reason}; remove the search", reason)
    if config.fits_head:
        raise FeaturesNeededError(f"{key}.head={config.head} needs features: {reason}; use {key}.head=linear", reason)
    if config.features == "on" or config.views is not None:
        raise FeaturesNeededError(f"{key}.features: {reason}; use {key}.features=off and views=null", reason)
    logger.info("stage %s: the frozen part runs in each epoch: %s", stage.name, reason)
