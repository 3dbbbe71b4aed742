"""The backbones that are named, and which of them can be used on this machine. Nothing is downloaded."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from distil_tl.models import timm_models, torchvision_models
from distil_tl.models.config import ModelConfig
from distil_tl.models.names import TIMM_PREFIX
from distil_tl.models.weight_packages import PACKAGES
from distil_tl.models.weight_sources import missing_weights
from distil_tl.selection.config import LISTS
from distil_tl.utils.args import refuse

_WILDCARDS = "*?["


@dataclass
class Found:
    """The backbones by whether they can be used.

    Attributes:
        usable: with their weights on this machine.
        missing: the names of weights that are not, by backbone.
        unusable: why others can't be used, by backbone.
    """

    usable: list[ModelConfig] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)


def expand(candidates: Sequence[str], *, pretrained: bool = True) -> list[str]:
    """The names of models that names, patterns and built-in lists stand for, each once, in this order.

    Args:
        pretrained: patterns stand only for models with weights.

    Raises:
        UserError: lists all names of models that do not exist, and patterns that no model has.
    """
    found: dict[str, None] = {}
    problems: list[str] = []
    for each in candidates:
        if each in LISTS:
            known = timm_models.installed()
            found |= dict.fromkeys(name for name in LISTS[each] if _exists(name, timm=known))
        elif any(mark in each for mark in _WILDCARDS):
            names = matching(each, pretrained=pretrained)
            if not names:
                problems.append(f"candidates: no model is named like {each!r}; timm models are written timm/NAME")
            found |= dict.fromkeys(names)
        else:
            own = ModelConfig(each).name_problems()
            problems += [f"candidates: {problem.removeprefix('model.name: ')}" for problem in own]
            found[each] = None
    refuse(problems)
    return list(found)


def matching(pattern: str, *, pretrained: bool) -> list[str]:
    """The models whose name matches a pattern, in alphabetical order: timm's for timm/PATTERN, else torchvision's."""
    if not pattern.startswith(TIMM_PREFIX):
        return sorted(fnmatch.filter(torchvision_models.names(), pattern))
    if not timm_models.installed():
        return []
    names = sorted(fnmatch.filter(timm_models.names(), pattern.removeprefix(TIMM_PREFIX)))
    prefixed = [TIMM_PREFIX + name for name in names]
    if not pretrained:
        return prefixed
    return [name for name in prefixed if name in PACKAGES or timm_models.has_weights(name.removeprefix(TIMM_PREFIX))]


def locate(names: Sequence[str], model: ModelConfig) -> Found:
    """Which of the models can be used, with the settings of `model` other than its name."""
    found = Found()
    for name in names:
        config = replace(model, name=name)
        if problems := config.problems():
            found.unusable[name] = "; ".join(problems)
        elif (source := missing_weights(config)) is not None:
            found.missing[name] = source
        else:
            found.usable.append(config)
    return found


def _exists(name: str, *, timm: bool) -> bool:
    """Whether the installed libraries have a model of a built-in list: older ones lack some."""
    if name.startswith(TIMM_PREFIX):
        return timm and timm_models.name_problem(name.removeprefix(TIMM_PREFIX)) is None
    return name in torchvision_models.names()
