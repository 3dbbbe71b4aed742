"""Stochastic depth and dropout of the libraries, as `model.drop_path` and `model.dropout` set them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distil_tl.models import timm_models, torchvision_models

if TYPE_CHECKING:
    from distil_tl.models.config import ModelConfig

_TIMM = {"drop_path": "drop_path_rate", "dropout": "drop_rate"}
_TORCHVISION = {"drop_path": "stochastic_depth_prob", "dropout": "dropout"}
_WHAT = {"drop_path": "stochastic depth", "dropout": "dropout before its head"}


def arguments(config: ModelConfig) -> dict[str, float]:
    """Arguments of the library's constructor for what the configuration sets."""
    names = _TIMM if config.from_timm else _TORCHVISION
    given = {"drop_path": config.drop_path, "dropout": config.dropout}
    return {names[key]: value for key, value in given.items() if value is not None}


def problem(name: str, key: str, *, from_timm: bool) -> str | None:
    """Why `model.KEY` can't be set for a model; None if it can.

    Args:
        name: in the library.
    """
    if from_timm:
        library, accepted = "timm", timm_models.accepts(name, _TIMM[key])
    else:
        library, accepted = "torchvision", torchvision_models.accepts(name, _TORCHVISION[key])
    if accepted:
        return None
    return f"model.{key}: {library} has no option for {_WHAT[key]} of {name}; remove model.{key}"
