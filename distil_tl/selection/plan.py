"""The cells of a grid: which networks fit which image sizes, what they cost, and what their results depend on."""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from distil_tl.data.pixels import unusual_pixels
from distil_tl.data.splits import Splits
from distil_tl.models.config import ModelConfig
from distil_tl.models.facts import count_macs
from distil_tl.models.own_models import source_digest
from distil_tl.models.transfer import TransferModel, build, default_preprocess, weights_file
from distil_tl.selection.cells import Cell
from distil_tl.selection.common import Common
from distil_tl.selection.config import GridConfig
from distil_tl.utils.errors import UserError

FORMAT = 1  # of the results; increased when cells are computed differently


def plan_cells(
    models: Sequence[ModelConfig], grid: GridConfig, common: Common, splits: Splits, device: str
) -> tuple[list[Cell], dict[str, str]]:
    """All cells, in the order of the lists; and for networks that a size does not fit, why.

    Args:
        device: the kind of device, such as cpu.
    """
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    for model in models:
        for size in grid.sizes or [default_preprocess(model).crop_size]:
            try:
                with torch.device("meta"):
                    network = build(model, len(splits.classes), image_size=size, seed=0, pretrained=False)
                    network.try_size(size, "sizes")
                    parameters = sum(parameter.numel() for parameter in network.module.parameters())
                    costs = parameters, count_macs(network.module, size)
            except UserError as error:
                left_out[f"{model.name} {size} px"] = str(error)
                continue
            for crop in grid.crops or [common.data.crop_mode]:
                cell = Cell(model.name, model.weights, size, crop, *costs)
                cells.append(replace(cell, digest=_digest(cell, common, splits, network, device)))
    return cells, left_out


def _digest(cell: Cell, common: Common, splits: Splits, network: TransferModel, device: str) -> str:
    """Of everything that the result of a cell depends on, other than the number of ranks."""
    data, config = common.data, common.model_of(cell)
    file = weights_file(config)[0]
    status = None if file is None else file.stat()
    library = sys.modules[type(network.module).__module__.partition(".")[0]]
    depends: dict[str, Any] = {
        "format": FORMAT,
        "model": asdict(config),
        "weights": None if file is None or status is None else [file.name, status.st_size, status.st_mtime_ns],
        "preprocess": network.preprocess.to_json(),
        "image_size": cell.image_size,
        "crop": [cell.crop_mode, data.crop_pct],
        "stage": [common.stage, asdict(common.config)],
        "optim": asdict(common.optim),
        "batch": data.global_batch_size,
        "balance": data.balance,
        "hflip": data.hflip,
        "intensity": data.intensity,
        "metric": common.metric,
        "precision": [common.precision, common.tf32, common.deterministic],
        "seed": common.seed,
        "images": {split: [index.fingerprint, index.times] for split, index in splits.as_dict().items()},
        "pixels": unusual_pixels(data),
        "on_bad_image": data.on_bad_image,
        "device": device,
        # A function of the user may load any weights: its results are not used again.
        "call": secrets.token_hex(8) if config.is_own and config.weights != "none" else None,
        "source": source_digest(network.module) if config.is_own else None,
        "versions": [torch.__version__, getattr(library, "__version__", "")],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]
