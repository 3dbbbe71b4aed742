"""The size of a model and its layer groups, without memory for its weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distil_tl.models import timm_models, torchvision_models
from distil_tl.models.config import ModelConfig
from distil_tl.models.layer_groups import has_prefix
from distil_tl.models.model_table import Entry
from distil_tl.models.names import TIMM_PREFIX
from distil_tl.models.transfer import TransferModel, build


@dataclass(frozen=True)
class Facts:
    """A model as it is built for a number of classes.

    Attributes:
        parameters: without the head.
        macs: multiply-accumulate operations for one image of its size, without the head; None where an operation is
            unknown on the device `meta`.
    """

    model: TransferModel
    parameters: int
    macs: int | None


def look_at(name: str, image_size: int | None = None) -> Facts:
    """A model on the device `meta`.

    Raises:
        UserError: it can't be used as an image classifier, or not for this image size.
    """
    with torch.device("meta"):
        model = build(ModelConfig(name, "none"), 2, image_size=image_size, seed=0, pretrained=False)
    heads = [model.module.get_submodule(path) for path in model.heads]
    counts = [p.numel() for key, p in model.module.named_parameters() if not has_prefix(key, model.heads)]
    macs = count_macs(model.module.requires_grad_(False), model.image_size)
    return Facts(model, sum(counts), None if macs is None else macs - sum(_macs_of_head(head) for head in heads))


def count_macs(module: nn.Module, size: int) -> int | None:
    """Multiply-accumulate operations of convolutions, linear layers and attention for one image of `size` pixels."""
    counter = FlopCounterMode(display=False)
    images = torch.zeros(1, 3, size, size, device=next(module.parameters()).device)
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings(), counter:
            warnings.simplefilter("ignore")
            module(images)
    except Exception:  # the model's code may ask for values
        return None
    finally:
        module.train()
    return int(counter.get_total_flops()) // 2


def _macs_of_head(head: nn.Module) -> int:
    """Of a linear layer: small, and for a convolution left in, as it depends on the size of its input."""
    return head.in_features * head.out_features if isinstance(head, nn.Linear) else 0


def published_entry(name: str) -> Entry:
    """What the libraries say of a model without building it."""
    if name.startswith(TIMM_PREFIX):
        size, weights, source = timm_models.published_as(name.removeprefix(TIMM_PREFIX))
    else:
        size, (weights, source) = (
            torchvision_models.preprocess(name, "default").crop_size,
            torchvision_models.published_as(name),
        )
    return Entry(name, None, size, None, weights, source)


def entry_of(name: str) -> Entry:
    """All columns of the table for a model. Raises UserError as `look_at`."""
    facts = look_at(name)
    return replace(published_entry(name), parameters=facts.parameters, macs=facts.macs)
