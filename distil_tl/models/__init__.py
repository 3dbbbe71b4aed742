"""Backbones with a new head: built, filled with weights and divided into the groups that stages train."""

from __future__ import annotations

from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.transfer import (
    TransferModel,
    WeightsInfo,
    build,
    default_preprocess,
    missing_weights,
    prepare_weights,
    weights_file,
)

__all__ = [
    "LayerGroup",
    "ModelConfig",
    "TransferModel",
    "WeightsInfo",
    "build",
    "default_preprocess",
    "missing_weights",
    "prepare_weights",
    "resolve_weights",
    "weights_file",
]
